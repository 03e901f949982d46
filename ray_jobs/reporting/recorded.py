"""A sweep's runs as MLflow holds them, whatever its users did to them there."""

import dataclasses
from typing import Any

from mlflow.entities import Run

from gsa.errors import RequestError
from gsa.tracking import OBJECTIVES, Tracking, read_json, tags_of
from ray_jobs.objectives import ConstraintConfig, ObjectiveConfig

CONSTRAINTS = "gsa.constraints"  # tags of a sweep's run
RATES = "gsa.rates"  # GPU-hours and money of an hour of one trial


@dataclasses.dataclass(frozen=True)
class Trial:
    """One trial's run."""

    run: Run
    trial_id: str
    params: dict[str, Any]
    state: str
    baseline: bool
    confirms: str | None  # the trial that it repeats with another seed

    @property
    def metrics(self) -> dict[str, float]:
        return dict(self.run.data.metrics)


def trials_of(tracking: Tracking, parent: Run) -> tuple[list[Trial], list[str]]:
    """The trials below a sweep's run, oldest first, and what is below it and is none, in words."""
    found: dict[str, Trial] = {}
    notes = []
    for run in tracking.children(parent.info.run_id):
        tags = tags_of(run)
        name = f"run {run.info.run_name!r} ({run.info.run_id})"
        if "gsa.trial_id" not in tags:
            notes.append(f"{name} is no trial of this sweep: it has no tag gsa.trial_id; left out")
            continue
        try:
            params = read_json(run, "gsa.params", dict)
            baseline = read_json(run, "gsa.baseline", bool) if "gsa.baseline" in tags else False
        except RequestError as error:
            notes.append(f"{error}; left out")
            continue
        trial = Trial(run, tags["gsa.trial_id"], params, tracking.state(run), baseline, tags.get("gsa.confirms"))
        if trial.trial_id in found:
            notes.append(f"trial {trial.trial_id} has several runs; the newest is shown, {run.info.run_id}")
        found[trial.trial_id] = trial
    return list(found.values()), notes


def read_aims(parent: Run) -> tuple[list[ObjectiveConfig], list[ConstraintConfig]]:
    """Objectives and constraints of a sweep.

    Raises:
        RequestError: the tags that hold them are missing or were edited.
    """
    objectives = _read_configs(parent, OBJECTIVES, ObjectiveConfig)
    if not objectives:
        raise RequestError(f"run {parent.info.run_name!r} ({parent.info.run_id}): its tag {OBJECTIVES} names none")
    return objectives, _read_configs(parent, CONSTRAINTS, ConstraintConfig) if CONSTRAINTS in tags_of(parent) else []


def read_rates(parent: Run) -> tuple[dict[str, float], list[str]]:
    """What an hour of one trial costs, and why that is not known, in words."""
    if RATES not in tags_of(parent):
        return {}, []
    try:
        rates = read_json(parent, RATES, dict)
    except RequestError as error:
        return {}, [f"{error}; the cost is left out"]
    return {name: float(rate) for name, rate in rates.items() if isinstance(rate, int | float)}, []


def _read_configs(parent: Run, key: str, kind: type[Any]) -> list[Any]:
    try:
        found = [kind(**item) for item in read_json(parent, key, list)]
    except TypeError as error:
        name = f"run {parent.info.run_name!r} ({parent.info.run_id})"
        raise RequestError(f"{name}: its tag {key} is not what was recorded ({error})") from error
    return found
