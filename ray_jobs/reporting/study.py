"""The Optuna study that the trials of a report stand for, and what it says of the parameters."""

import dataclasses
import math
import warnings
from typing import Any

import numpy as np
import optuna
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial

from gsa.tracking import Tracking
from ray_jobs import dimensions
from ray_jobs.objectives import Aims, ObjectiveConfig
from ray_jobs.record import COMPLETE, FAIL, PRUNED, RUNNING, Entry
from ray_jobs.space import Space
from ray_jobs.stored import stored_sweep
from ray_jobs.studies import optuna_trial

ENOUGH = 8  # finished trials below which importances would be noise
BEST = 0.25  # share of trials that count as good; Optuna's own tenth of a small sweep is one or two
SHUFFLES = 19  # whatever is above all of them is so by chance once in 20 times
SHUFFLED = 300  # trials that are shuffled, at most: chance gives less the more there are, so fewer are on the safe side
STATES = {"finished": COMPLETE, "stopped_early": PRUNED, "failed": FAIL, "killed": FAIL, "running": RUNNING}

Curve = list[tuple[int, float]]  # the first objective by step


@dataclasses.dataclass
class Importances:
    """How much each parameter decides each objective, by PED-ANOVA (Watanabe et al., 2023); shares add up to 1.

    Of a few dozen trials most of it is noise, so the same is computed with the objective's values shuffled among the
    trials: a parameter stands out where it is above every parameter in every shuffle (a permutation test at 5 %, for
    all parameters together).
    """

    objectives: dict[str, dict[str, float]]  # metric to parameter to share, the largest first
    stands_out: dict[str, list[str]]  # metric to the parameters whose share is not mere chance
    trials: int  # finished ones that they are computed from
    note: str  # why an objective has none


def read_space(tracking: Tracking, run_id: str) -> Space:
    """The search space of a sweep, from the configuration that its run has as artifact.

    Raises:
        RequestError: the run has none, or it is of a version with other settings.
    """
    stored = stored_sweep(tracking, run_id)
    return Space(dimensions.read_space("space", stored.space), stored.train)


def entry_of(trial: dict[str, Any], objectives: list[ObjectiveConfig], curve: Curve, space: Space) -> Entry:
    """A trial of a report as an entry of a record."""
    metrics = trial["metrics"]
    values = [float(metrics.get(o.metric, math.nan)) for o in objectives]
    state = STATES[trial["state"]]
    reason = trial["reason"]
    if state == COMPLETE and not all(map(math.isfinite, values)):
        state, reason = FAIL, reason or f"objectives are {values}"
    return Entry(
        trial["trial_id"],
        trial["params"],
        space.settings(trial["params"]),
        state=state,
        steps={step: {objectives[0].metric: value} for step, value in curve},
        values=values if state == COMPLETE else None,
        reason=reason,
    )


def importances(entries: list[Entry], space: Space, aims: Aims) -> Importances:
    """Importances of all parameters, conditional ones among them, for each objective, from the finished trials."""
    finished = [entry for entry in entries if entry.state == COMPLETE]
    if len(finished) < ENOUGH:
        return Importances({}, {}, len(finished), f"too few finished trials: {len(finished)} of at least {ENOUGH}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trials = [optuna_trial(entry, space, aims, {}) for entry in finished]
    study, fewer = _study(trials), _study(trials[:SHUFFLED])
    found: dict[str, dict[str, float]] = {}
    stands_out, without = {}, []
    for i, objective in enumerate(aims.objectives):
        values = objective.sign * np.array([entry.values[i] for entry in finished if entry.values])
        raw = _raw(study, values)
        total = sum(raw.values())
        if total > 0:
            ranked = sorted(raw, key=lambda key: (-raw[key], key))
            chance = _chance(fewer, values[:SHUFFLED])
            found[objective.metric] = {key: raw[key] / total for key in ranked}
            stands_out[objective.metric] = [key for key in ranked if raw[key] > chance]
        else:
            without.append(objective.metric)
    note = f"no parameter tells good trials from others in {', '.join(without)}" if without else ""
    return Importances(found, stands_out, len(finished), note)


def _study(trials: list[FrozenTrial]) -> optuna.Study:
    study = optuna.create_study(directions=["minimize"] * len(trials[0].values))
    study.add_trials(trials)
    return study


def _raw(study: optuna.Study, values: "np.ndarray[Any, Any]") -> dict[str, float]:
    """PED-ANOVA of values by number of the trial, less being better."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few trials, which the report says in its own way
        return optuna.importance.get_param_importances(
            study,
            evaluator=PedAnovaImportanceEvaluator(target_quantile=BEST),
            target=lambda trial: float(values[trial.number]),
            normalize=False,
        )


def _chance(study: optuna.Study, values: "np.ndarray[Any, Any]") -> float:
    """The most that any parameter reaches with shuffled values."""
    generator = np.random.default_rng(0)
    return max(max(_raw(study, generator.permutation(values)).values()) for _ in range(SHUFFLES))
