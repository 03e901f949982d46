"""A sweep of a few short trials: its configuration, how it is run, and what must be left of it."""

import os
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from ray_jobs.record import COMPLETE, Record
from ray_jobs.report import Report
from ray_jobs.sweep import load_sweep, run_sweep
from tests.ray_jobs.store import Store
from tests.text import tiny

QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115 - lives as long as the tests
STAGES = [{"kind": "dense", "steps": 4}, {"kind": "warmup", "steps": 2}, {"kind": "sparse", "steps": 6}]
SPACE: dict[str, Any] = {
    "training.optimizer.learning_rate": {"type": "float", "low": 1e-3, "high": 1e-2, "log": True},
    "model.attention.controller.k": {"type": "int", "low": 2, "high": 12},
}


def write_sweep(folder: Path, seed: int, **changes: Any) -> Path:
    """A sweep of six short trials without a scheduler, one after another: they share one process."""
    sweep: dict[str, Any] = {
        "name": "small",
        "train": tiny(folder, seed, training__stages=STAGES, evaluation__every=4),
        "space": SPACE,
        "objectives": [{"metric": "held_out_loss"}, {"metric": "held_out_selected_fraction"}],
        "num_samples": 5,
        "max_concurrent_trials": 1,
        "scheduler": {"kind": "none"},
        "gate": False,
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(sweep | changes))
    return path


def run(path: Path, *overrides: str) -> Report:
    return run_sweep(load_sweep(path, list(overrides)), QUIET)


def lines(path: Path) -> int:
    """How many lines a file has, such as a record that grows."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def check_whole(folder: Path, trials: int) -> None:
    """Nothing lost and nothing doubled: trials, runs, steps."""
    record = Record(folder / "sweeps/small/record.jsonl")
    assert len(record.trials()) == trials
    assert all(entry.state == COMPLETE for entry in record.trials())
    store = Store(folder)
    assert store.parent().info.status == "FINISHED"
    steps = {e.trial_id: [4, 8, 10] if e.baseline else [4, 8, 12] for e in record.trials()}
    store.check_steps(steps)
    assert {e.trial_id: sorted(e.steps) for e in record.trials()} == steps
    for trial in store.children().values():
        assert (trial.info.status, trial.data.tags["gsa.state"]) == ("FINISHED", "finished")
