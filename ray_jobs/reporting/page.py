"""A report as one HTML file: readable with no network, in light and dark, on wide and narrow windows.

What comes from users is escaped by Jinja; and should anything ever slip through, the page's content security policy
lets only the page's own two scripts run, and nothing be loaded.
"""

import base64
import datetime
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from gsa.errors import RequestError, one_line
from ray_jobs.report import BITS, Report, settings_text
from ray_jobs.reporting import figures

HERE = Path(__file__).parent
FAILED = ("failed", "killed")


def to_html(report: Report) -> str:
    """The page."""
    loader = jinja2.FileSystemLoader(HERE)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["settings"] = settings_text
    plotly, script = _inline(get_plotlyjs()), _inline((HERE / "page.js").read_text(encoding="utf-8"))
    plots = {name: _plain(draw(report)) for name, draw in PLOTS.items()}
    return environment.get_template("page.html").render(
        report=report,
        rows=[_row(report, trial) for trial in report.trials],
        names=[o["metric"] for o in report.objectives],
        best=next((t for t in report.trials if t["trial_id"] == report.best), None),
        counts=Counter(t["state"] for t in report.trials),
        failures=[t for t in report.trials if t["state"] in FAILED or t["reason"]],
        constraints=[str(c) for c in report.aims().constraints],
        broken=Counter(n for t in report.trials for n, over in t["violations"].items() if over > 0),
        totals=_totals(report),
        shown=figures.SHOWN,
        with_layers=sum(bool(layers) for layers in report.layers.values()),
        plots=plots,
        empty=_empty(report),
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        plotly=plotly,
        script=script,
        hashes=[_hash(plotly), _hash(script)],
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def write_html(report: Report, path: Path) -> None:
    """Write the page to a file.

    Raises:
        RequestError: the file cannot be written.
    """
    try:
        path.write_text(to_html(report), encoding="utf-8")
    except (OSError, ValueError) as error:  # the latter of a zero byte
        raise RequestError(f"--html {path}: cannot be written ({one_line(error)})") from error


PLOTS = {
    "pareto": figures.pareto,
    "history": figures.history,
    "importances": figures.importances,
    "curves": figures.curves,
    "layers": figures.layers,
    "cost": figures.cost,
}


def _empty(report: Report) -> dict[str, str]:
    """What stands where a plot has nothing to show."""
    finished = "No trial came to its end."
    return {
        "pareto": finished if len(report.objectives) > 1 else "One objective: the front is the best trial.",
        "history": finished,
        "importances": (report.importances.note or finished).capitalize() + ".",
        "curves": "No trial has been evaluated.",
        "layers": "No trial has measurements by layer.",
        "cost": "No trial has ended.",
    }


def _row(report: Report, trial: dict[str, Any]) -> dict[str, Any]:
    metrics = trial["metrics"]
    bits = metrics.get(BITS)
    return {
        "trial": trial,
        "front": trial["trial_id"] in report.pareto,
        "steps": metrics.get("step"),
        "values": [metrics.get(o["metric"]) for o in report.objectives],
        "against": [None if bits is None else bits - floor for floor in report.floors.values()],
        "seconds": report.cost.get(trial["trial_id"], {}).get("seconds"),
        "settings": settings_text(trial["params"]),
    }


def _totals(report: Report) -> dict[str, float]:
    units = sorted({unit for spent in report.cost.values() for unit in spent}, key=lambda u: (u != "seconds", u))
    return {unit.replace("_", " "): sum(spent.get(unit, 0.0) for spent in report.cost.values()) for unit in units}


def _plain(found: figures.Figures) -> list[dict[str, Any]]:
    return [{"title": title, "figure": json.loads(figure.to_json())} for title, figure in found.items()]


def _inline(script: str) -> str:
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--").replace("\r", "")


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
