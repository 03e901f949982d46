"""An invented trial. Light, as the processes that run trials import it: what does no work has no torch."""

import dataclasses
import random
import time
from collections.abc import Callable
from pathlib import Path

from ray import tune

from gsa.spool import Spool
from ray_jobs.record import Proposal

RATE = "training.optimizer.learning_rate"
METRICS = [f"metric_{i}" for i in range(10)]


@dataclasses.dataclass(frozen=True)
class Invented:
    """A trial that reports `results` results, `seconds` apart, and makes its run's rows as a real one does."""

    folder: Path
    results: int = 1
    seconds: float = 0.0
    fault: Callable[[Proposal, int], None] | None = None

    def __call__(self, proposal: Proposal) -> None:
        spool = Spool(self.folder / "trials" / proposal["trial_id"])
        draw = random.Random(proposal["trial_id"])
        for step in range(max(spool.last_step, 0) + 1, self.results + 1):
            time.sleep(self.seconds)
            if self.fault is not None:
                self.fault(proposal, step)
            loss = abs(proposal["settings"][RATE] - 1e-3) + 1 / step
            spool.append(step, {"held_out_loss": loss} | {name: draw.random() for name in METRICS})
            self._report(step, loss)
        self._report(self.results, abs(proposal["settings"][RATE] - 1e-3) + 1 / self.results)

    def _report(self, step: int, loss: float) -> None:
        tune.report(
            {"step": step, "held_out_loss": loss, "seconds": step * self.seconds, "complete": step == self.results}
        )
