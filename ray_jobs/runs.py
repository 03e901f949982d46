"""Runs as MLflow has to know them. Light, as the process that logs imports it, and nothing of torch."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ray_jobs.record import Entry


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """One run, as MLflow has to know it."""

    key: str  # by which it is found again
    name: str
    parent: str | None  # the sweep's run
    tags: dict[str, str]
    folder: Path


@dataclasses.dataclass(frozen=True)
class TrialContext:
    """What all trials of a sweep share."""

    sweep: str
    base: dict[str, Any]  # a TrainConfig that each trial starts from
    folder: str  # of the sweep
    parent: str  # the sweep's run
    tags: dict[str, str]  # of every trial's run

    @property
    def seen(self) -> str:
        """A file that is there before the first trial."""
        return str(Path(self.folder) / "sweep.yaml")

    @property
    def stop(self) -> str:
        """The file by which the driver asks trials to save and stop."""
        return str(Path(self.folder) / ".stop")

    def trial_folder(self, trial_id: str) -> Path:
        return Path(self.folder) / "trials" / trial_id

    def run(self, entry: Entry) -> RunInfo:
        """A trial's run; a report reads its tags."""
        tags = self.tags | {
            "gsa.sweep": self.sweep,
            "gsa.trial_id": entry.trial_id,
            "gsa.params": json.dumps(entry.params),
            "gsa.baseline": json.dumps(entry.baseline),
        }
        if entry.confirms is not None:
            tags["gsa.confirms"] = entry.confirms
        if entry.imported is not None:
            tags["gsa.imported"] = entry.imported
        key, folder = run_key(self.sweep, entry.trial_id), self.trial_folder(entry.trial_id)
        return RunInfo(key, entry.trial_id, self.parent, tags, folder)


@dataclasses.dataclass(frozen=True)
class TrainContext:
    """A single run that no sweep started."""

    name: str
    folder: str
    tags: dict[str, str]

    def run(self, entry: Entry) -> RunInfo:
        return RunInfo(f"train/{self.name}", self.name, None, self.tags, Path(self.folder))


def run_key(sweep: str, trial_id: str = "") -> str:
    """By what a trial's run, or the sweep's own, is found again in MLflow."""
    return f"{sweep}/{trial_id}"
