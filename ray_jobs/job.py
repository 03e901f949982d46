"""What it takes to train a run, as plain data that crosses processes; nothing of Ray."""

import dataclasses
from typing import Any

from gsa.config import TrainConfig, build
from ray_jobs.record import Proposal
from ray_jobs.runs import TrialContext
from ray_jobs.space import compose


@dataclasses.dataclass(frozen=True)
class Job:
    """One run."""

    config: dict[str, Any]  # a TrainConfig
    folder: str  # of the run's checkpoints and spool, on storage that every worker sees
    seen: str  # a file that the driver has written and that every worker has to see
    stop: str  # the file by which the driver asks for a stop (`ray_jobs.stop`)
    until: int | None = None  # step at which it pauses

    def settings(self) -> TrainConfig:
        return build(TrainConfig, dict(self.config))


def job_of(context: TrialContext, proposal: Proposal) -> Job:
    """What it takes to train a trial of a sweep."""
    trial_id = proposal["trial_id"]
    config = compose(context.base, proposal["settings"] | {"name": trial_id})
    folder = str(context.trial_folder(trial_id))
    return Job(dataclasses.asdict(config), folder, context.seen, context.stop, proposal["until"])
