"""What share of a sweep's wall time goes to the searcher and to logging.

    python -m tests.bench.share --trials 300 --seconds 1

Invented trials on real Tune, ten results each. Counted are the driver's seconds in the searcher (the record on disk
included), and those at the end in which nothing runs but what still has to be told to MLflow.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray_jobs.cluster import running
from tests.bench.invented import InventedSweep
from tests.bench.trial import Invented

RESULTS = 10


class Watch:
    """Seconds spent in some calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def over(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a trial")
    parser.add_argument("--sampler", default="tpe")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, running():
        folder, watch, ends = Path(name), Watch(), [0.0]
        sweep = InventedSweep(folder, asked.trials, asked.sampler)
        for method in ("suggest", "on_trial_result", "on_trial_complete"):
            setattr(sweep.searcher, method, watch.over(getattr(sweep.searcher, method)))
        sweep.record.subscribe(lambda event, entry: ends.append(time.perf_counter()))
        began = time.perf_counter()
        late = sweep.run(Invented(folder, RESULTS, asked.seconds / RESULTS))
        wall, drained = time.perf_counter() - began, time.perf_counter() - ends[-1]
        print(
            f"{asked.trials} trials of {asked.seconds:g} s, {asked.sampler}: {wall:.1f} s; "
            f"searcher {watch.seconds:.1f} s, after the last trial {drained:.1f} s ({late or 'all logged'}): "
            f"{100 * (watch.seconds + drained) / wall:.1f} % of the wall time"
        )
        print(sweep.check(RESULTS))


if __name__ == "__main__":
    main()
