"""One trial of a sweep: what Tune runs in a process of its own.

A trial with one worker trains right there; a larger one starts the workers of a Ray Train run from there.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from ray_jobs.record import Proposal
from ray_jobs.space import compose
from ray_jobs.worker import LASTING, Job, fit, one_line, work


@dataclasses.dataclass(frozen=True)
class TrialContext:
    """What all trials of a sweep share; plain data, as it crosses processes."""

    sweep: str
    base: dict[str, Any]  # a TrainConfig that each trial starts from
    folder: str  # of the sweep
    parent: str  # the sweep's run
    tags: dict[str, str]  # of every trial's run

    def job(self, proposal: Proposal) -> Job:
        """What it takes to train a trial; a report reads its tags."""
        trial_id = proposal["trial_id"]
        config = compose(self.base, proposal["settings"] | {"name": trial_id})
        tags = self.tags | {
            "gsa.sweep": self.sweep,
            "gsa.trial_id": trial_id,
            "gsa.params": json.dumps(proposal["params"]),
            "gsa.baseline": json.dumps(proposal["baseline"]),
        }
        return Job(
            config=dataclasses.asdict(config),
            folder=str(Path(self.folder) / "trials" / trial_id),
            run_key=run_key(self.sweep, trial_id),
            run_name=trial_id,
            parent=self.parent,
            tags=tags,
        )


def run_key(sweep: str, trial_id: str = "") -> str:
    """By what a trial's run, or the sweep's own, is found again in MLflow."""
    return f"{sweep}/{trial_id}"


def make_trainable(context: TrialContext) -> Callable[[Proposal], None]:
    """The function that Tune calls with each of the searcher's proposals.

    What would fail again in the same way ends the trial with its reason as result; anything else is raised, and Tune
    starts the trial again from its checkpoint.
    """

    def train_trial(proposal: Proposal) -> None:
        try:
            job = context.job(proposal)
            if job.settings().workers.num_workers == 1:
                work(job, tune.report)
            else:
                fit(job, [TuneReportCallback()])
        except LASTING as error:
            tune.report({"failed": one_line(error)})

    return train_trial
