"""The one call of Ray Tune: trials of a searcher, until it has no more."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler

from ray_jobs.record import Proposal
from ray_jobs.searcher import GsaSearcher

NODE_DIED = "its node has died"  # in Ray's message on an actor, which says so nowhere else


def run_trials(
    trainable: Callable[[Proposal], None],
    searcher: GsaSearcher,
    folder: Path,
    concurrent: int,
    resources: Mapping[str, float],
) -> None:
    """Run what the searcher proposes.

    Args:
        trainable: trains one trial.
        searcher: proposes, and takes results into the record.
        folder: of the sweep.
        concurrent: trials at once.
        resources: of one trial.
    """
    # not `Tuner`, which would pickle the searcher: the record is the only memory of a sweep
    tune.run(
        trainable,
        name="tune",
        storage_path=str(folder),
        search_alg=searcher,
        scheduler=_Faults(searcher),
        num_samples=-1,  # until the searcher has no more
        max_concurrent_trials=concurrent,
        resources_per_trial=dict(resources),
        reuse_actors=True,  # the next trial starts in the process of one that has ended
        raise_on_failed_trial=False,
        stop=_Stopper(searcher),
        trial_name_creator=_own_name,
        trial_dirname_creator=_own_name,
        verbose=0,
    )


class _Stopper(tune.Stopper):
    """Ends the experiment once it was interrupted, has spent its budget or lost its storage. Trials that run then have
    saved what they have trained; they stay unfinished in the record, and go on when the sweep does."""

    def __init__(self, searcher: GsaSearcher) -> None:
        self.searcher = searcher

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.searcher.cuts_off()


class _Faults(FIFOScheduler):
    """Tells the searcher, before Tune does that a trial has failed, when it was its node that died."""

    def __init__(self, searcher: GsaSearcher) -> None:
        super().__init__()
        self.searcher = searcher

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        with contextlib.suppress(OSError):  # Tune could not write down why it failed
            if NODE_DIED in Path(trial.error_file).read_text(encoding="utf-8"):
                self.searcher.lost_node(trial.trial_id)


def _own_name(trial: Any) -> str:
    return str(trial.config["trial_id"])
