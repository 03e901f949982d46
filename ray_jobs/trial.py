"""One trial of a sweep: what Tune runs in a process of its own.

A trial with one worker trains right there; a larger one starts the workers of a Ray Train run from there.
"""

from collections.abc import Callable
from pathlib import Path

from ray import tune

from gsa.errors import one_line
from ray_jobs.job import job_of
from ray_jobs.nested import train_nested
from ray_jobs.record import Proposal
from ray_jobs.runs import TrialContext
from ray_jobs.storage import NotSharedError, refuse_unshared
from ray_jobs.worker import LASTING, work


def make_trainable(context: TrialContext) -> Callable[[Proposal], None]:
    """The function that Tune calls with each of the searcher's proposals.

    What would fail again in the same way ends the trial with its reason as result; a node that does not see the storage
    ends the sweep; anything else is raised, and Tune starts the trial again from its checkpoint.
    """

    def train_trial(proposal: Proposal) -> None:
        try:
            refuse_unshared(Path(context.seen))
            job = job_of(context, proposal)
            if job.settings().workers.num_workers == 1:
                work(job, tune.report)
            else:
                train_nested(job, tune.report)
        except NotSharedError as error:
            tune.report({"not_shared": one_line(error)})
        except LASTING as error:
            tune.report({"failed": one_line(error)})

    return train_trial
