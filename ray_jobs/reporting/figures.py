"""Plots of a report, as plotly figures; the page gives them the colours of text and grid.

- What comes from users (names, settings) is escaped: plotly reads labels as HTML.
- Series that grow with the trials are single traces with gaps, so that thousands of trials stay light.
"""

import html
import math
from collections.abc import Iterable
from typing import Any

import plotly.graph_objects as go

from ray_jobs.report import BITS, Report, settings_text, short_names, value_text
from ray_jobs.reporting.layers import Layer
from ray_jobs.reporting.study import Curve

BEST, FRONT, FINISHED, STOPPED, DENSE = "#d9730d", "#2f7fd1", "#6fa8dc", "#858b94", "#9b6dd6"  # on white and on black
SCALE = ["#fff6d6", "#a9d8c0", "#4aa3c7"]  # light enough for dark numbers
SHOWN = 40  # trials of the layer maps and of the cost: the best ones
LABELLED = 200  # cells of a map in which numbers can be read
STATE_COLORS = {"finished": FINISHED, "stopped_early": STOPPED, "failed": "#d64550", "killed": "#b08a2e"}

Figures = dict[str, go.Figure]  # by what is chosen on the page


def pareto(report: Report) -> Figures:
    """Finished trials by their objectives: the first against each other one. Empty where there is one objective."""
    names = [o["metric"] for o in report.objectives]
    return {f"{other}": _plane(report, names[0], other) for other in names[1:] if _measured(report)}


def history(report: Report) -> Figures:
    """The first objective in the order in which trials started, and the best so far."""
    trials = sorted(_measured(report), key=lambda t: (t["start_time"], t["trial_id"]))
    if not trials:
        return {}
    name, least = report.objectives[0]["metric"], report.objectives[0]["mode"] == "min"
    values = [t["metrics"][name] for t in trials]
    best: list[float] = []
    for value in values:
        best.append(value if not best else (min if least else max)(best[-1], value))
    number = list(range(1, len(trials) + 1))
    points = go.Scatter(
        x=number, y=values, mode="markers", name="finished", marker={"color": FINISHED, "size": 9},
        text=[_about(t) for t in trials], hovertemplate="%{text}<br>%{y:.5g}<extra></extra>",
    )  # fmt: skip
    line = go.Scatter(x=number, y=best, mode="lines", name="best so far", line={"color": BEST, "shape": "hv"})
    return {name: _figure([line, points], "finished trials, in order of their start", _aim(report, 0))}


def importances(report: Report) -> Figures:
    """Shares of the parameters, by objective."""
    found = {}
    for metric, shares in report.importances.objectives.items():
        keys, short = list(shares)[::-1], short_names(list(shares))
        clear = report.importances.stands_out[metric]
        bars = go.Bar(
            x=[shares[k] for k in keys], y=[_text(short[k]) for k in keys], orientation="h",
            marker={"color": [FRONT if k in clear else STOPPED for k in keys]},
            text=[f"{shares[k]:.0%}" for k in keys], textposition="auto",
            hovertext=[_text(k) for k in keys], hovertemplate="%{hovertext}<br>%{x:.1%}<extra></extra>",
        )  # fmt: skip
        figure = _figure([bars], "share", None, height=110 + 26 * len(keys), legend=False)
        figure.update_xaxes(tickformat=".0%", rangemode="tozero")
        figure.update_yaxes(type="category", automargin=True)
        found[metric] = figure
    return found


def curves(report: Report) -> Figures:
    """The first objective by step: stopped trials, finished ones, the best, the dense baseline, and the floors."""
    name = report.objectives[0]["metric"]
    states = {t["trial_id"]: t["state"] for t in report.trials}
    drawn = {trial_id: curve for trial_id, curve in report.curves.items() if curve}
    if not drawn:
        return {}
    others = [t for t in drawn if t != report.best]
    groups = {
        "not finished": ([t for t in others if t in states and states[t] != "finished"], STOPPED, "solid", 1.0),
        "finished": ([t for t in others if states.get(t) == "finished"], FINISHED, "solid", 1.5),
        "dense baseline": ([t for t in others if t not in states], DENSE, "dash", 2.0),
        "best": ([t for t in drawn if t == report.best], BEST, "solid", 3.0),
    }
    traces = [
        _lines(label, [(t, drawn[t]) for t in chosen], color, dash, width)
        for label, (chosen, color, dash, width) in groups.items()
        if chosen
    ]
    figure = _figure(traces, "optimizer step", _aim(report, 0))
    if name == BITS:
        for floor, value in report.floors.items():
            figure.add_hline(
                value, line={"dash": "dot", "width": 1, "color": STOPPED}, annotation_text=_text(floor.split("_")[0])
            )
    return {name: figure}


def layers(report: Report) -> Figures:
    """Each statistic, and each numeric setting in which layers differ, by trial and layer; the best trials on top."""
    trials = [t for t in report.trials if report.layers.get(t["trial_id"])][:SHOWN]
    rows = [report.layers[t["trial_id"]] for t in trials]
    found = {}
    for kind, label in (("metrics", ""), ("settings", "setting: ")):
        names = dict.fromkeys(name for row in rows for layer in row for name in layer[kind])
        for name in names:
            cells = [[_number(layer[kind].get(name)) for layer in row] for row in rows]
            if any(value is not None for row in cells for value in row):
                found[label + name] = _map(name, [t["trial_id"] for t in trials], rows, cells)
    return found


def cost(report: Report) -> Figures:
    """What trials have cost, by unit; the most expensive on top."""
    states = {t["trial_id"]: t["state"] for t in report.trials}
    found = {}
    for unit in sorted({unit for spent in report.cost.values() for unit in spent}, key=lambda u: (u != "seconds", u)):
        spent = {t: units[unit] for t, units in report.cost.items() if unit in units}
        ids = sorted(spent, key=lambda t: spent[t])[-SHOWN:]
        bars = [
            go.Bar(
                x=[spent[t] for t in chosen], y=[_text(t) for t in chosen], orientation="h",
                marker={"color": STATE_COLORS.get(state, DENSE)}, name=state.replace("_", " "),
                hovertemplate="%{y}<br>%{x:.4g}<extra></extra>",
            )
            for state in (*STATE_COLORS, "running", "dense baseline")
            if (chosen := [t for t in ids if states.get(t, "dense baseline") == state])
        ]  # fmt: skip
        figure = _figure(bars, unit.replace("_", " "), None, height=140 + 20 * len(ids))
        figure.update_yaxes(type="category", categoryarray=[_text(t) for t in ids], automargin=True, dtick=1)
        figure.update_xaxes(rangemode="tozero")
        found[unit.replace("_", " ")] = figure
    return found


def _plane(report: Report, first: str, other: str) -> go.Figure:
    trials = _measured(report)
    front = [t for t in trials if t["trial_id"] in report.pareto]
    groups = [("dominated", [t for t in trials if t not in front], FINISHED, "circle", 8)]
    groups.append(("Pareto front", [t for t in front if t["trial_id"] != report.best], FRONT, "diamond", 11))
    groups.append(("best", [t for t in front if t["trial_id"] == report.best], BEST, "star", 15))
    traces = []
    if len(report.objectives) == 2 and len(front) > 1:
        ordered = sorted(front, key=lambda t: float(t["metrics"][first]))
        traces.append(
            go.Scatter(
                x=[t["metrics"][first] for t in ordered], y=[t["metrics"][other] for t in ordered], mode="lines",
                line={"color": FRONT, "width": 1.5, "dash": "dot"}, showlegend=False, hoverinfo="skip",
            )
        )  # fmt: skip
    for label, chosen, color, symbol, size in groups:
        if chosen:
            traces.append(
                go.Scatter(
                    x=[t["metrics"][first] for t in chosen], y=[t["metrics"][other] for t in chosen], mode="markers",
                    name=label, marker={"color": color, "symbol": symbol, "size": size},
                    text=[_about(t) for t in chosen],
                    hovertemplate="%{text}<br>(%{x:.5g}, %{y:.5g})<extra></extra>",
                )
            )  # fmt: skip
    names = [o["metric"] for o in report.objectives]
    return _figure(traces, _aim(report, names.index(first)), _aim(report, names.index(other)))


def _lines(label: str, drawn: Iterable[tuple[str, Curve]], color: str, dash: str, width: float) -> go.Scatter:
    x: list[int | None] = []
    y: list[float | None] = []
    text: list[str] = []
    for trial_id, curve in drawn:
        x += [*(step for step, _ in curve), None]
        y += [*(value for _, value in curve), None]
        text += [_text(trial_id)] * (len(curve) + 1)
    return go.Scatter(
        x=x, y=y, text=text, mode="lines+markers", name=label, line={"color": color, "dash": dash, "width": width},
        marker={"size": 4}, hovertemplate="%{text}<br>step %{x}: %{y:.5g}<extra></extra>",
    )  # fmt: skip


def _map(name: str, ids: list[str], rows: list[list[Layer]], cells: list[list[float | None]]) -> go.Figure:
    count = max(map(len, cells))
    padded = [[*row, *[None] * (count - len(row))] for row in cells][::-1]
    hover = [[_layer_text(layer) for layer in row] + [""] * (count - len(row)) for row in rows][::-1]
    figure = go.Figure(
        go.Heatmap(
            z=padded, x=[str(i) for i in range(count)], y=[_text(t) for t in ids][::-1],
            colorscale=SCALE,
            textfont={"color": "#1c2128"}, text=hover,
            hovertemplate="%{y}, layer %{x}<br>%{z:.4g}<br>%{text}<extra></extra>", xgap=1, ygap=1,
            texttemplate="%{z:.3g}" if len(ids) * count <= LABELLED and count <= 8 else "",
            colorbar={"title": {"text": _text(name), "side": "right"}, "thickness": 12, "outlinewidth": 0},
        )
    )  # fmt: skip
    _lay_out(figure, "layer", None, 150 + 22 * len(ids), legend=False)
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", automargin=True, showgrid=False, dtick=1)
    return figure


def _figure(traces: list[Any], x: str, y: str | None, height: int = 420, legend: bool = True) -> go.Figure:
    figure = go.Figure(traces)
    _lay_out(figure, x, y, height, legend)
    return figure


def _lay_out(figure: go.Figure, x: str, y: str | None, height: int, legend: bool) -> None:
    figure.update_layout(
        template=None, height=height, margin={"l": 10, "r": 10, "t": 76 if legend else 30, "b": 10}, showlegend=legend,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}, hovermode="closest",
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
    )  # fmt: skip
    figure.update_xaxes(title={"text": x}, automargin=True, zeroline=False)
    figure.update_yaxes(title={"text": y}, automargin=True, zeroline=False)


def _measured(report: Report) -> list[dict[str, Any]]:
    names = [o["metric"] for o in report.objectives]
    return [t for t in report.trials if t["state"] == "finished" and all(name in t["metrics"] for name in names)]


def _aim(report: Report, i: int) -> str:
    objective = report.objectives[i]
    return f"{_text(objective['metric'])} ({'less' if objective['mode'] == 'min' else 'more'} is better)"


def _about(trial: dict[str, Any]) -> str:
    settings = settings_text(trial["params"]).split(" ")
    lines = [" ".join(settings[i : i + 3]) for i in range(0, min(len(settings), 30), 3)]
    return "<br>".join(_text(line) for line in (trial["trial_id"], *lines))


def _layer_text(layer: Layer) -> str:
    return _text(" ".join(f"{name}={value_text(value)}" for name, value in layer["settings"].items()))


def _number(value: Any) -> float | None:
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None


def _text(text: str) -> str:
    return html.escape(text)
