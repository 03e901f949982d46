"""The leaderboard of a sweep on a terminal: trials by rank, their settings, and what they tell."""

from rich.console import Console

from ray_jobs.report import BITS, Report, short_names, value_text
from ray_jobs.tables import Column, header_of, show_columns


def show(report: Report, console: Console) -> None:
    """Print the leaderboard. `*` marks the Pareto front, `!` what breaks a constraint; the floors stand beside each
    trial's bits per byte."""
    _show_results(report, console)
    _show_settings(report, console)
    _show_findings(report, console)
    _show_cost(report, console)
    console.print("\nPareto front (*): " + (", ".join(report.pareto) or "empty: no trial came to its end"))
    if report.best is not None:
        name = report.objectives[0]["metric"]
        best = next(trial for trial in report.trials if trial["trial_id"] == report.best)
        _say(console, f"best: {report.best}, {name} {best['metrics'][name]:.4f}, {best['checkpoint']}")


def _show_results(report: Report, console: Console) -> None:
    ids = [trial["trial_id"] for trial in report.trials]
    metrics = [trial["metrics"] for trial in report.trials]
    front = ["*" if trial["trial_id"] in report.pareto else "" if trial["feasible"] else "!" for trial in report.trials]
    steps = [f"{m['step']:.0f}" if "step" in m else "" for m in metrics]
    first = [
        Column("", front),
        Column("trial", ids),
        Column("state", [trial["state"] for trial in report.trials]),
        Column("steps", steps, right=True),
    ]
    measured = [
        Column(header_of(name.removeprefix("held_out_")), [_number(m.get(name), ".4f") for m in metrics], right=True)
        for name in (objective["metric"] for objective in report.objectives)
    ]
    measured += [
        Column(f"vs\n{floor.split('_')[0]}", [_number(m.get(BITS), "+.3f", value) for m in metrics], right=True)
        for floor, value in report.floors.items()
    ]
    show_columns(console, f"sweep {report.sweep}", first, measured, key=[Column("trial", ids)])


def _show_settings(report: Report, console: Console) -> None:
    short = short_names(list(dict.fromkeys(key for trial in report.trials for key in trial["params"])))
    if not short:
        return
    columns = [
        Column(header_of(name), [value_text(t["params"][key]) if key in t["params"] else "" for t in report.trials])
        for key, name in short.items()
    ]
    show_columns(console, "settings", [Column("trial", [t["trial_id"] for t in report.trials])], columns)


def _show_findings(report: Report, console: Console) -> None:
    for floor, value in report.floors.items():
        _say(console, f"{floor.split('_')[0]} model on the same held-out text: {value:.4f} bits per byte")
    if report.importances.note:
        _say(console, f"importance of parameters: {report.importances.note}")
    for metric, shares in report.importances.objectives.items():
        short = short_names(list(shares))
        clear = report.importances.stands_out[metric]
        ranked = ", ".join(f"{short[key]} {shares[key]:.0%}" for key in clear) or "nothing"
        _say(console, f"importance for {metric}: {ranked}; what else there is may be chance")
    for trial in report.trials:
        if trial["reason"]:
            _say(console, f"{trial['trial_id']} {trial['state']}: {trial['reason']}")
        broken = [f"{name} (by {over:.4g})" for name, over in trial["violations"].items() if over > 0]
        if broken:
            _say(console, f"! {trial['trial_id']} breaks {', '.join(broken)}")
    for one in report.confirmed:
        spread = f"{report.objectives[0]['metric']} {one['mean']:.4f} ± {one['deviation']:.4f}"
        _say(console, f"{one['trial_id']} over {len(one['values'])} seeds: {spread}")
    for a, b, p in report.alike:
        _say(console, f"{a} and {b} cannot be told apart (Welch's t-test, p = {p:.2f})")
    for note in report.notes:
        _say(console, f"note: {note}")


def _show_cost(report: Report, console: Console) -> None:
    total = {unit: sum(cost.get(unit, 0.0) for cost in report.cost.values()) for unit in ("gpu_hours", "money")}
    hours = sum(cost["seconds"] for cost in report.cost.values()) / 3600
    more = "".join(f", {total[unit]:.3g} {unit.replace('_', '-')}" for unit in total if total[unit])
    _say(console, f"training took {hours:.3g} hours{more}")


def _say(console: Console, text: str) -> None:
    """A sentence, wrapped between words."""
    console.print(text, markup=False, highlight=False)


def _number(value: float | None, form: str, floor: float = 0.0) -> str:
    return "" if value is None else format(value - floor, form)
