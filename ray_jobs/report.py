"""What a sweep has found, read from MLflow alone: leaderboard, Pareto front, the floors to compare with, importances of
the parameters, learning curves, what each layer selects, and cost."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from mlflow.entities import Run

from gsa.errors import RequestError
from gsa.settings import nearest
from gsa.tracking import OBJECTIVES, REASON, Tracking
from ray_jobs.confirm import Confirmed, indistinguishable
from ray_jobs.objectives import Aims, ConstraintConfig, ObjectiveConfig
from ray_jobs.reporting.layers import Layer, layers_of
from ray_jobs.reporting.study import Curve, Importances, entry_of, importances, read_space
from ray_jobs.runs import run_key
from ray_jobs.space import Space

BITS = "held_out_bits_per_byte"
CONSTRAINTS = "gsa.constraints"  # tags of a sweep's run
RATES = "gsa.rates"  # GPU-hours and money of an hour of one trial


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
    tags = parent.data.tags
    objectives, constraints = json.loads(tags[OBJECTIVES]), json.loads(tags.get(CONSTRAINTS, "[]"))
    aims = Aims([ObjectiveConfig(**o) for o in objectives], [ConstraintConfig(**c) for c in constraints])
    floors = {k.removeprefix("floor_"): v for k, v in parent.data.metrics.items() if k.startswith("floor_")}
    children = tracking.children(parent.info.run_id)
    dense: dict[str, float] = {}
    for run in children:
        if _is(run, "baseline") and tracking.state(run) == "finished":
            dense = dict(run.data.metrics)
            floors |= {"dense_bits_per_byte": dense[BITS]} if BITS in dense else {}
    searched = [run for run in children if not _is(run, "baseline") and "gsa.confirms" not in run.data.tags]
    trials = [_trial(run, tracking.state(run), aims, dense) for run in searched]
    values = {t["trial_id"]: aims.values(t["metrics"]) for t in trials if t["state"] == "finished"}
    pareto = aims.front((t["trial_id"], v) for t in trials if t["feasible"] and (v := values.get(t["trial_id"])))
    first = aims.objectives[0]
    worst = first.sign * float("inf")
    trials.sort(
        key=lambda t: (
            values.get(t["trial_id"]) is None, not t["feasible"], first.sign * t["metrics"].get(first.metric, worst)
        )
    )  # fmt: skip
    ids = {run.info.run_id: str(run.data.tags["gsa.trial_id"]) for run in children}
    curves = {ids[run_id]: curve for run_id, curve in tracking.histories(list(ids), first.metric).items()}
    space, refused = _space(tracking, parent.info.run_id)
    confirmed = _confirmed(children, {t["trial_id"]: t["metrics"] for t in trials}, first.metric)
    return Report(
        sweep, objectives, constraints, floors, trials, pareto, pareto[0] if pareto else None, parent.info.run_id,
        importances=_importances(trials, curves, aims, space, refused),
        curves=curves,
        layers={t["trial_id"]: layers_of(t["metrics"], t["params"], space) for t in trials},
        cost={ids[run.info.run_id]: _cost(run, json.loads(tags.get(RATES, "{}"))) for run in children},
        confirmed=[dataclasses.asdict(c) | {"mean": c.mean, "deviation": c.deviation} for c in confirmed],
        alike=indistinguishable(confirmed),
    )  # fmt: skip


def _trial(run: Run, state: str, aims: Aims, dense: dict[str, float]) -> dict[str, Any]:
    tags, run_id = run.data.tags, run.info.run_id
    violations = aims.violations(run.data.metrics, dense) if state == "finished" else {}
    return {
        "feasible": all(violation <= 0 for violation in violations.values()),
        "violations": violations,  # by how much a constraint is broken; 0 or less where it holds
        "trial_id": tags["gsa.trial_id"],
        "state": state,
        "params": json.loads(tags["gsa.params"]),
        "metrics": {k: v for k, v in run.data.metrics.items() if not k.startswith("system/")},
        "run_id": run_id,
        "checkpoint": f"runs:/{run_id}" if state == "finished" else None,
        "reason": tags.get(REASON, ""),
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


def _confirmed(children: list[Run], trials: dict[str, dict[str, float]], metric: str) -> list[Confirmed]:
    """Candidates that were trained with other seeds too, the best mean first in the order of their trials."""
    found: dict[str, list[float]] = {}
    for run in children:
        original = run.data.tags.get("gsa.confirms")
        if original is not None and run.info.status == "FINISHED" and metric in run.data.metrics:
            found.setdefault(original, [trials[original][metric]]).append(run.data.metrics[metric])
    return [Confirmed(trial_id, values) for trial_id, values in found.items()]


def _cost(run: Run, rates: dict[str, float]) -> dict[str, float]:
    """What a trial has cost: seconds of training, and at the sweep's rates an hour, GPU-hours and money."""
    seconds = run.data.metrics.get("training_seconds", 0.0)
    return {"seconds": seconds} | {name: seconds / 3600 * rate for name, rate in rates.items() if rate}


def _is(run: Run, what: str) -> bool:
    return bool(json.loads(run.data.tags.get(f"gsa.{what}", "false")))


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
