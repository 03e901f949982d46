"""What it takes to train a run, as plain data that crosses processes; nothing of Ray."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from gsa.config import TrainConfig, build
from ray_jobs.record import Entry, Proposal
from ray_jobs.space import compose


@dataclasses.dataclass(frozen=True)
class Job:
    """One run."""

    config: dict[str, Any]  # a TrainConfig
    folder: str  # of the run's checkpoints and spool, on storage that every worker sees
    until: int | None = None  # step at which it pauses

    def settings(self) -> TrainConfig:
        return build(TrainConfig, dict(self.config))


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

    def trial_folder(self, trial_id: str) -> Path:
        return Path(self.folder) / "trials" / trial_id

    def job(self, proposal: Proposal) -> Job:
        """What it takes to train a trial."""
        trial_id = proposal["trial_id"]
        config = compose(self.base, proposal["settings"] | {"name": trial_id})
        return Job(dataclasses.asdict(config), str(self.trial_folder(trial_id)), proposal["until"])

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
