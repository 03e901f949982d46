"""Stopping hopeless trials early: asynchronous successive halving (Li et al., arXiv 1810.05934), Ray Tune's own.

Tune's ASHA stops trials and never takes one up again; it judges by the first objective alone, at rungs of equal
steps. Its state is rebuilt by repeating the record's results to it.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from gsa.errors import ConfigError
from gsa.settings import setting
from ray_jobs.record import PRUNED, RUNNING, Entry, Record
from ray_jobs.searcher import ObjectiveConfig


@dataclasses.dataclass
class SchedulerConfig:
    kind: str = setting("asha", "asha: asynchronous successive halving; none: every trial runs to its end",
                        choices=("asha", "none"))  # fmt: skip
    grace_period: int = setting(50, "optimizer steps before which no trial is stopped (asha)", ge=1)
    reduction_factor: int = setting(3, "one in this many trials goes on at each rung (asha)", ge=2)

    def refuse_short(self, total_steps: int) -> None:
        """Raise ConfigError where a trial's steps are fewer than the grace period."""
        if self.kind == "asha" and self.grace_period > total_steps:
            raise ConfigError("scheduler.grace_period", self.grace_period, f"must be <= a trial's {total_steps} steps")


class Halving(AsyncHyperBandScheduler):
    """ASHA that knows trials by our names for them, and leaves baselines alone."""

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, _ours(trial))

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if trial.config["baseline"]:
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, _ours(trial), result))

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Its rungs hold all that it reported."""

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """As on_trial_complete."""


def make_scheduler(
    config: SchedulerConfig, objective: ObjectiveConfig, total_steps: int, record: Record
) -> TrialScheduler:
    """The scheduler of a sweep, in the state that its record stands for.

    Trials that it had decided to stop, but that were cut off before they could be, are ended in the record.

    Raises:
        ConfigError: the grace period is longer than a trial.
    """
    config.refuse_short(total_steps)
    if config.kind == "none":
        return FIFOScheduler()
    scheduler = Halving(
        time_attr="step",
        metric=objective.metric,
        mode=objective.mode,
        max_t=total_steps,
        grace_period=config.grace_period,
        reduction_factor=config.reduction_factor,
        stop_last_trials=False,
    )
    for entry in record.trials():
        scheduler.on_trial_add(None, _stand_in(entry))
    stopped = set()
    for event in record.events:
        if event["event"] == "result":
            entry = record.entries[event["trial_id"]]
            result = event["values"] | {"step": event["step"]}
            if scheduler.on_trial_result(None, _stand_in(entry), result) == TrialScheduler.STOP:
                stopped.add(entry.trial_id)
    for trial_id in sorted(stopped):
        if record.entries[trial_id].state == RUNNING:
            record.end(trial_id, PRUNED)
    return scheduler


def _ours(trial: Any) -> Any:
    return SimpleNamespace(trial_id=trial.config["trial_id"])


def _stand_in(entry: Entry) -> Any:
    return SimpleNamespace(config={"trial_id": entry.trial_id, "baseline": entry.baseline})
