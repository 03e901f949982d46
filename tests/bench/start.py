"""How long a trial takes to start where another has just ended.

    python -m tests.bench.start

Real sweeps, one trial at a time: from the end of one trial in the record to the first row of the next in its spool.
That is the search, Tune, the process that is used again, data, model and one step. A nested trial has two workers.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from rich.console import Console

from gsa.spool import rows
from ray_jobs.record import Record
from ray_jobs.sweep import load_sweep, run_sweep
from tests.bench.trial import RATE
from tests.ray_jobs.small import SPACE, write_sweep
from tests.text import tiny

STAGES = [{"kind": "dense", "steps": 4}]


def starts(folder: Path, workers: int, trials: int) -> list[float]:
    """Seconds from the end of each trial to the first step of the next."""
    path = write_sweep(
        folder,
        0,
        train=tiny(folder, 0, training__stages=STAGES, training__log_every=1, workers__num_workers=workers),
        space={RATE: SPACE[RATE]},
        objectives=[{"metric": "held_out_loss"}],
        num_samples=trials,
        max_concurrent_trials=1,
        gate=True,
        dense_baseline=False,
    )
    with (folder / "log").open("w") as log:
        run_sweep(load_sweep(path, []), Console(file=log))
    home = folder / "runs/sweeps/small"
    record = Record(home / "record.jsonl")
    ends = [float(event["time"]) for event in record.events if event["event"] == "end"]
    first = [next(rows(home / "trials" / entry.trial_id)).time / 1000 for entry in record.trials()]
    return [begin - end for end, begin in zip(ends, first[1:], strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    asked = parser.parse_args()
    for workers in asked.workers:
        with tempfile.TemporaryDirectory() as name:
            took = starts(Path(name), workers, asked.trials)
        print(
            f"{workers} worker(s): {statistics.median(took):.2f} s from one trial's end to the next one's first step "
            f"(median of {len(took)}; {json.dumps([round(t, 2) for t in took])})",
            flush=True,
        )


if __name__ == "__main__":
    main()
