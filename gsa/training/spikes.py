"""Counting loss spikes."""

import statistics
from collections import deque


class SpikeCounter:
    """A loss spike is a step whose training loss exceeds the mean of the 32 steps before it by more than four of
    their standard deviations and by more than 0.1 nats. Fewer than 32 earlier steps of a stage judge nothing."""

    WINDOW = 32

    def __init__(self) -> None:
        self.count = 0
        self.recent: deque[float] = deque(maxlen=self.WINDOW)

    def add(self, loss: float) -> None:
        if len(self.recent) == self.WINDOW:
            mean, deviation = statistics.fmean(self.recent), statistics.pstdev(self.recent)
            self.count += loss - mean > max(4 * deviation, 0.1)
        self.recent.append(loss)

    def new_stage(self) -> None:
        """Another stage has another loss: forget the steps before it, keep the count."""
        self.recent.clear()

    def state_dict(self) -> dict[str, int | list[float]]:
        return {"count": self.count, "recent": list(self.recent)}

    def load_state_dict(self, state: dict[str, int | list[float]]) -> None:
        count, recent = state["count"], state["recent"]
        assert isinstance(count, int)
        assert isinstance(recent, list)
        self.count, self.recent = count, deque(recent, maxlen=self.WINDOW)
