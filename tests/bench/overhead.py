"""What searching and logging cost beside the trials: trials of no work on real Tune, with reused actors.

    python -m tests.bench.overhead --trials 2000 --sampler random
    python -m tests.bench.overhead --trials 1000 --sampler tpe

Tune alone (random search of its own, nothing logged) runs as many trials first, in the same process and cluster.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from ray import tune

from ray_jobs.cluster import running
from tests.bench.invented import InventedSweep, rss
from tests.bench.trial import RATE, Invented

WINDOW = 200  # trials over which a time per trial is taken


def alone(folder: Path, trials: int, concurrent: int) -> tuple[float, list[float], list[float]]:
    """Seconds of Tune with nothing of ours; when each trial ended, and what this process had in memory then."""
    ends: list[float] = []
    memory: list[float] = []

    class Clock(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            ends.append(time.perf_counter())
            memory.append(rss())

    def nothing(config: dict[str, Any]) -> None:
        for step in (1, 1):  # as many reports as ours
            tune.report({"step": step, "held_out_loss": config[RATE], "complete": True})

    began = time.perf_counter()
    tune.run(
        nothing, config={RATE: tune.loguniform(1e-4, 1e-2)}, num_samples=trials, reuse_actors=True, verbose=0,
        storage_path=str(folder), name="alone", max_concurrent_trials=concurrent, resources_per_trial={"CPU": 1},
        callbacks=[Clock()],
    )  # fmt: skip
    return time.perf_counter() - began, ends, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--sampler", default="random")
    parser.add_argument("--concurrent", type=int, default=2)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, running():
        path = Path(folder)
        stock, ends, stock_memory = alone(path, asked.trials, asked.concurrent)
        print(
            f"Tune alone: {asked.trials} trials in {stock:.1f} s, {1e3 * stock / asked.trials:.1f} ms a trial",
            flush=True,
        )
        sweep = InventedSweep(path / "ours", asked.trials, asked.sampler)
        times: list[float] = []
        memory: list[float] = []

        def observe(event: dict[str, Any], entry: Any) -> None:
            if event["event"] == "end":
                times.append(time.perf_counter())
                memory.append(rss())

        sweep.record.subscribe(observe)
        began, before = time.perf_counter(), os.times()
        late = sweep.run(Invented(path / "ours"), asked.concurrent)
        ours, after = time.perf_counter() - began, os.times()
        print(
            f"ours, {asked.sampler}: {ours:.1f} s, {times[-1] - began:.1f} s until the last trial; "
            f"{late or 'all logged'}"
        )
        # the only child that has ended by now is the one that logs
        logging = after.children_user + after.children_system - before.children_user - before.children_system
        each = 1e3 * logging / asked.trials
        print(f"ours / Tune alone: {ours / stock:.2f}; the process that logs took {each:.1f} ms of CPU a trial")
        for trial in range(WINDOW, min(len(times), len(ends)) + 1, WINDOW):
            own, other = (statistics.fmean(_steps(t, trial)) for t in (times, ends))
            print(
                f"trials up to {trial}: ours {1e3 * own:.1f}, alone {1e3 * other:.1f} ms a trial, "
                f"{1e3 * (own - other):+.1f}"
            )
        print(
            f"the driver's memory grew by {_growth(memory):.1f} KiB a trial over the second half, "
            f"Tune's alone by {_growth(stock_memory):.1f}"
        )
        print(sweep.check(1))


def _steps(times: list[float], trial: int) -> list[float]:
    part = times[trial - WINDOW : trial]
    return [b - a for a, b in zip(part, part[1:], strict=False)] or [math.nan]


def _growth(memory: list[float]) -> float:
    """KiB a trial over the second half."""
    half = len(memory) // 2
    return (memory[-1] - memory[half]) / max(len(memory) - half, 1) * 1024


if __name__ == "__main__":
    main()
