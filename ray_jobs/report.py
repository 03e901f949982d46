"""What a sweep has found, read from MLflow alone: leaderboard, Pareto front, the floors to compare with, importances of
the parameters, learning curves, what each layer selects, and cost."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from gsa.errors import RequestError
from gsa.settings import nearest
from gsa.tracking import REASON, Tracking
from ray_jobs.confirm import Confirmed, indistinguishable
from ray_jobs.objectives import Aims, ConstraintConfig, ObjectiveConfig
from ray_jobs.reporting.layers import Layer, layers_of
from ray_jobs.reporting.recorded import Trial, read_aims, read_rates, trials_of
from ray_jobs.reporting.study import Curve, Importances, entry_of, importances, read_space
from ray_jobs.runs import run_key
from ray_jobs.space import Space

BITS = "held_out_bits_per_byte"


@dataclasses.dataclass
class Report:
    sweep: str
    objectives: list[dict[str, str]]
    constraints: list[dict[str, Any]]
    floors: dict[str, float]  # bits per byte of a bigram model and of a dense model
    trials: list[dict[str, Any]]  # best first; those that did not come to their end last
    pareto: list[str]  # trial ids
    best: str | None  # trial id
    run_id: str  # of the sweep
    importances: Importances
    curves: dict[str, Curve]  # the first objective by step, by trial id, the dense baseline's too
    layers: dict[str, list[Layer]]  # by trial id
    cost: dict[str, dict[str, float]]  # by trial id, all that ran: seconds, gpu_hours, money
    confirmed: list[dict[str, Any]]  # candidates over several seeds, in the first objective
    alike: list[tuple[str, str, float]]  # pairs of them that cannot be told apart, and p
    notes: list[str]  # what is missing, or was changed in MLflow

    def aims(self) -> Aims:
        return Aims([ObjectiveConfig(**o) for o in self.objectives], [ConstraintConfig(**c) for c in self.constraints])

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)


def read_report(tracking: Tracking, sweep: str) -> Report:
    """Read a sweep's results.

    Raises:
        RequestError: there is no such sweep in this store.
    """
    parent = tracking.find_run(run_key(sweep))
    if parent is None:
        known = sorted(tracking.sweeps())
        close = nearest(sweep, known) or nearest(Path(sweep).stem, known)  # the path of its folder, or of its file
        hint = close or (f"; known: {', '.join(known)}" if known else "")
        raise RequestError(f"sweep {sweep!r}: is not in {tracking.uri}{hint}")
    aims = Aims(*read_aims(parent))
    objectives = [dataclasses.asdict(o) for o in aims.objectives]
    constraints = [dataclasses.asdict(c) for c in aims.constraints]
    rates, notes = read_rates(parent)
    floors = {k.removeprefix("floor_"): v for k, v in parent.data.metrics.items() if k.startswith("floor_")}
    children, left_out = trials_of(tracking, parent)
    dense: dict[str, float] = {}
    for child in children:
        if child.baseline and child.state == "finished":
            dense = child.metrics
            floors |= {"dense_bits_per_byte": dense[BITS]} if BITS in dense else {}
    searched = [child for child in children if not child.baseline and child.confirms is None]
    trials = [_trial(child, aims, dense) for child in searched]
    values = {t["trial_id"]: aims.values(t["metrics"]) for t in trials if t["state"] == "finished"}
    pareto = aims.front((t["trial_id"], v) for t in trials if t["feasible"] and (v := values.get(t["trial_id"])))
    first = aims.objectives[0]
    worst = first.sign * float("inf")
    trials.sort(
        key=lambda t: (
            values.get(t["trial_id"]) is None, not t["feasible"], first.sign * t["metrics"].get(first.metric, worst)
        )
    )  # fmt: skip
    ids = {child.run.info.run_id: child.trial_id for child in children}
    curves = {ids[run_id]: curve for run_id, curve in tracking.histories(list(ids), first.metric).items()}
    space, refused = _space(tracking, parent.info.run_id)
    confirmed, missing = _confirmed(children, {t["trial_id"]: t["metrics"] for t in trials}, first.metric)
    return Report(
        sweep, objectives, constraints, floors, trials, pareto, pareto[0] if pareto else None, parent.info.run_id,
        importances=_importances(trials, curves, aims, space, refused),
        curves=curves,
        layers={t["trial_id"]: layers_of(t["metrics"], t["params"], space) for t in trials},
        cost={child.trial_id: _cost(child, rates) for child in children},
        confirmed=[dataclasses.asdict(c) | {"mean": c.mean, "deviation": c.deviation} for c in confirmed],
        alike=indistinguishable(confirmed),
        notes=[*notes, *left_out, *missing],
    )  # fmt: skip


def _trial(trial: Trial, aims: Aims, dense: dict[str, float]) -> dict[str, Any]:
    run, run_id, finished = trial.run, trial.run.info.run_id, trial.state == "finished"
    violations = aims.violations(run.data.metrics, dense) if finished else {}
    return {
        "feasible": all(violation <= 0 for violation in violations.values()),
        "violations": violations,  # by how much a constraint is broken; 0 or less where it holds
        "trial_id": trial.trial_id,
        "state": trial.state,
        "params": trial.params,
        "metrics": {k: v for k, v in trial.metrics.items() if not k.startswith("system/")},
        "run_id": run_id,
        "checkpoint": f"runs:/{run_id}" if finished else None,
        "reason": run.data.tags.get(REASON, ""),
        "start_time": run.info.start_time,  # milliseconds since 1970
        "end_time": run.info.end_time,  # the same, null while it runs
    }


def _space(tracking: Tracking, run_id: str) -> tuple[Space | None, str]:
    """The sweep's space, or why it is not known: a report can be read without it."""
    try:
        return read_space(tracking, run_id), ""
    except RequestError as error:
        return None, str(error)


def _importances(
    trials: list[dict[str, Any]], curves: dict[str, Curve], aims: Aims, space: Space | None, refused: str
) -> Importances:
    if space is None:
        return Importances({}, {}, 0, refused)
    return importances([entry_of(t, aims.objectives, curves[t["trial_id"]], space) for t in trials], space, aims)


def _confirmed(
    children: list[Trial], trials: dict[str, dict[str, float]], metric: str
) -> tuple[list[Confirmed], list[str]]:
    """Candidates that were trained with other seeds too, in the order of their first repeat, and those whose own run
    is not there, in words."""
    repeats: dict[str, list[float]] = {}
    for child in children:
        if child.confirms is not None and child.run.info.status == "FINISHED" and metric in child.metrics:
            repeats.setdefault(child.confirms, []).append(child.metrics[metric])
    known = {trial_id: [trials[trial_id][metric]] for trial_id in repeats if metric in trials.get(trial_id, {})}
    notes = [
        f"trial {trial_id} was repeated with {len(repeats[trial_id])} other seeds, but its own run, or {metric} of it, "
        "is not in MLflow: not compared"
        for trial_id in repeats
        if trial_id not in known
    ]
    return [Confirmed(trial_id, first + repeats[trial_id]) for trial_id, first in known.items()], notes


def _cost(trial: Trial, rates: dict[str, float]) -> dict[str, float]:
    """What a trial has cost: seconds of training, and at the sweep's rates an hour, GPU-hours and money."""
    seconds = trial.metrics.get("training_seconds", 0.0)
    return {"seconds": seconds} | {name: seconds / 3600 * rate for name, rate in rates.items() if rate}


def short_names(keys: list[str]) -> dict[str, str]:
    """The last part of each key, with the part before it where two would be the same."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return {
        key: ".".join(key.rsplit(".", 2)[-2:]) if last.count(name) > 1 else name
        for key, name in zip(keys, last, strict=True)
    }


def settings_text(params: dict[str, Any]) -> str:
    """Parameters in few words."""
    short = short_names(list(params))
    return " ".join(f"{short[key]}={value_text(value)}" for key, value in params.items())


def value_text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else json.dumps(value).replace('"', "").replace(" ", "")
