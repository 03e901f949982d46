"""One trial of a sweep: what Tune runs in a process of its own.

A trial with one worker trains right there; a larger one starts the workers of a Ray Train run from there.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune

from gsa.errors import InfrastructureError, one_line
from ray_jobs import stop
from ray_jobs.job import job_of
from ray_jobs.nested import train_nested
from ray_jobs.record import Proposal
from ray_jobs.runs import TrialContext
from ray_jobs.storage import refuse_unshared
from ray_jobs.worker import LASTING, work


def make_trainable(context: TrialContext) -> Callable[[Proposal], None]:
    """The function that Tune calls with each of the searcher's proposals.

    What would fail again in the same way ends the trial, with its reason as result. A disk or a node that fails ends
    the sweep and not the trial, which goes on when the sweep does. Anything else is raised, and Tune starts the trial
    again from its checkpoint.
    """

    def train_trial(proposal: Proposal) -> None:
        ended = False

        def report(metrics: dict[str, Any]) -> None:
            nonlocal ended
            ended = bool(metrics["complete"] or metrics["paused"])
            tune.report(metrics)

        try:
            refuse_unshared(Path(context.seen))
            job = job_of(context, proposal)
            if job.settings().workers.num_workers == 1:
                work(job, report)
            else:
                train_nested(job, report)
            if not ended and stop.watch(Path(context.stop))():
                tune.report({"stopped": True})  # Tune prints a line for a trial that ends without a word
        except (InfrastructureError, OSError) as error:
            tune.report({"infrastructure": f"{proposal['trial_id']}: {one_line(error)}"})
        except LASTING as error:
            tune.report({"failed": one_line(error)})

    return train_trial
