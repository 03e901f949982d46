"""A sweep whose driver is killed with SIGKILL at random moments, resumed each time, and then compared with what it
should hold: trials, runs, steps.

    python -m tests.bench.kill --kills 20
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from ray_jobs.record import COMPLETE, Record
from tests.ray_jobs.store import Store
from tests.text import tiny

STAGES = [{"kind": "dense", "steps": 4}, {"kind": "warmup", "steps": 2}, {"kind": "sparse", "steps": 6}]


def write(folder: Path, trials: int, seed: int) -> Path:
    sweep: dict[str, Any] = {
        "name": "small",
        "train": tiny(folder, seed, training__stages=STAGES, evaluation__every=4),
        "space": {"training.optimizer.learning_rate": {"type": "float", "low": 1e-3, "high": 1e-2, "log": True}},
        "objectives": [{"metric": "held_out_loss"}],
        "num_samples": trials,
        "scheduler": {"kind": "none"},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    asked = parser.parse_args()
    draw = random.Random(asked.seed)
    print(f"seed {asked.seed}")
    with tempfile.TemporaryDirectory() as name:
        folder, began = Path(name), time.monotonic()
        trials = asked.kills + 2  # enough that one is left to kill
        gsa = [sys.executable, "-m", "ray_jobs.cli"]
        resume = [*gsa, "sweep", "--resume", "small", "--storage", str(folder / "runs")]
        command = [*gsa, "sweep", str(write(folder, trials, asked.seed))]
        kills = early = 0
        while kills < asked.kills:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(draw.uniform(2, 16))
            early += process.poll() is not None
            process.kill()
            process.wait()
            kills += 1
            if (folder / "runs/sweeps/small/sweep.yaml").exists():
                command = resume
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        record = Record(folder / "runs/sweeps/small/record.jsonl")
        steps = {e.trial_id: [4, 8, 10] if e.baseline else [4, 8, 12] for e in record.trials()}
        store = Store(folder / "runs")
        store.check_steps(steps)
        states = {run.data.tags["gsa.state"] for run in store.children().values()}
        complete = sum(e.state == COMPLETE for e in record.trials())
        print(
            f"{kills} kills ({early} after the end), exit code at last {ended.returncode}: {complete} of {trials + 1} "
            f"trials complete, {len(store.children())} runs {sorted(states)}, each step of each once; "
            f"{time.monotonic() - began:.0f} s"
        )
        assert complete == len(store.children()) == trials + 1
        assert states == {"finished"}


if __name__ == "__main__":
    main()
