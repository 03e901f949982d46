"""What a sweep has found, read from MLflow alone: leaderboard, Pareto front, and the floors to compare with."""

import dataclasses
import json
from typing import Any

from mlflow.entities import Run
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from gsa.errors import RequestError
from gsa.settings import nearest
from gsa.tracking import OBJECTIVES, REASON, Tracking
from ray_jobs.trial import run_key

BITS = "held_out_bits_per_byte"


@dataclasses.dataclass
class Report:
    sweep: str
    objectives: list[dict[str, str]]
    floors: dict[str, float]  # bits per byte of a bigram model and of a dense model
    trials: list[dict[str, Any]]  # best first; those that did not come to their end last
    pareto: list[str]  # trial ids
    best: str | None  # trial id

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
        hint = nearest(sweep, known) or (f"; known: {', '.join(known)}" if known else "")
        raise RequestError(f"sweep {sweep!r}: is not in {tracking.uri}{hint}")
    objectives = json.loads(parent.data.tags[OBJECTIVES])
    floors = {k.removeprefix("floor_"): v for k, v in parent.data.metrics.items() if k.startswith("floor_")}
    trials = []
    for run in tracking.children(parent.info.run_id):
        if json.loads(run.data.tags.get("gsa.baseline", "false")):
            if BITS in run.data.metrics and tracking.state(run) == "finished":
                floors["dense_bits_per_byte"] = run.data.metrics[BITS]
        else:
            trials.append(_trial(run, tracking.state(run)))
    names, modes = [o["metric"] for o in objectives], [o["mode"] for o in objectives]
    values = {
        t["trial_id"]: [t["metrics"][name] for name in names]
        for t in trials
        if t["state"] == "finished" and all(name in t["metrics"] for name in names)
    }
    pareto = pareto_front(values, modes)
    sign = 1 if modes[0] == "min" else -1
    pareto.sort(key=lambda t: sign * values[t][0])
    trials.sort(key=lambda t: (t["trial_id"] not in values, sign * t["metrics"].get(names[0], float("inf"))))
    return Report(sweep, objectives, floors, trials, pareto, pareto[0] if pareto else None)


def pareto_front(values: dict[str, list[float]], modes: list[str]) -> list[str]:
    """The trials than which no other is at least as good in every objective and better in one."""
    signs = [1 if mode == "min" else -1 for mode in modes]

    def dominates(a: list[float], b: list[float]) -> bool:
        pairs = [(s * x, s * y) for s, x, y in zip(signs, a, b, strict=True)]
        return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)

    return [t for t, own in values.items() if not any(dominates(other, own) for other in values.values())]


def show(report: Report, console: Console) -> None:
    """Print the leaderboard. `*` marks the Pareto front; the floors stand beside each trial's bits per byte."""
    names = [o["metric"] for o in report.objectives]
    table = Table(
        title=f"sweep {report.sweep}", title_justify="left", box=SIMPLE, pad_edge=False, collapse_padding=True
    )
    for header in ("", "trial", "state", "steps"):
        table.add_column(header, no_wrap=True)
    for name in (*names, *(f"vs {floor.split('_')[0]}" for floor in report.floors)):
        # one word a line in the header, so that numbers decide the width
        table.add_column(name.removeprefix("held_out_").replace("_", "\n"), justify="right", no_wrap=True)
    for trial in report.trials:
        metrics, bits = trial["metrics"], trial["metrics"].get(BITS)
        against = [f"{bits - floor:+.3f}" if bits is not None else "" for floor in report.floors.values()]
        front = "*" if trial["trial_id"] in report.pareto else ""
        steps = f"{metrics['step']:.0f}" if "step" in metrics else ""
        measured = [f"{metrics[name]:.4f}" if name in metrics else "" for name in names]
        table.add_row(front, trial["trial_id"], trial["state"], steps, *measured, *against)
    console.print(table)
    for trial in report.trials:
        console.print(f"{trial['trial_id']}  {_settings(trial['params'])}", markup=False, highlight=False)
    console.print()
    for floor, value in report.floors.items():
        console.print(f"{floor.split('_')[0]} model on the same held-out text: {value:.4f} bits per byte")
    for trial in report.trials:
        if trial["reason"]:
            console.print(f"{trial['trial_id']} {trial['state']}: {trial['reason']}", markup=False, soft_wrap=True)
    console.print("\nPareto front (*): " + (", ".join(report.pareto) or "empty: no trial came to its end"))
    if report.best is not None:
        best = next(trial for trial in report.trials if trial["trial_id"] == report.best)
        aim = f"{names[0]} {best['metrics'][names[0]]:.4f}"
        console.print(f"best: {report.best}, {aim}, {best['checkpoint']}", soft_wrap=True)


def _trial(run: Run, state: str) -> dict[str, Any]:
    tags, run_id = run.data.tags, run.info.run_id
    return {
        "trial_id": tags["gsa.trial_id"],
        "state": state,
        "params": json.loads(tags["gsa.params"]),
        "metrics": {k: v for k, v in run.data.metrics.items() if not k.startswith("system/")},
        "run_id": run_id,
        "checkpoint": f"runs:/{run_id}" if state == "finished" else None,
        "reason": tags.get(REASON, ""),
    }


def _settings(params: dict[str, Any]) -> str:
    """Parameters in few words: the last part of each key, with the part before it where that is needed."""
    last = [key.rsplit(".", 1)[-1] for key in params]
    words = []
    for key, value in params.items():
        short = ".".join(key.rsplit(".", 2)[-2:]) if last.count(key.rsplit(".", 1)[-1]) > 1 else key.rsplit(".", 1)[-1]
        text = f"{value:.3g}" if isinstance(value, float) else json.dumps(value).replace('"', "").replace(" ", "")
        words.append(f"{short}={text}")
    return " ".join(words)
