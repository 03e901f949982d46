"""The one call of Ray Tune: trials of a searcher, until it has no more."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray import tune

from ray_jobs.record import Proposal
from ray_jobs.searcher import GsaSearcher


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
    """Ends the experiment once it was interrupted or has spent its budget; trials that run then stay unfinished in the
    record, and go on when the sweep does."""

    def __init__(self, searcher: GsaSearcher) -> None:
        self.searcher = searcher

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.searcher.halted


def _own_name(trial: Any) -> str:
    return str(trial.config["trial_id"])
