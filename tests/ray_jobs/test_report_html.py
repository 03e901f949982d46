"""The report as a page and as JSON: what is in it, and that nothing in it can break out of it."""

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import optuna
import pytest
from rich.console import Console

from gsa.config import TrainConfig, build, to_yaml
from gsa.errors import RequestError
from gsa.tracking import Tracking
from ray_jobs.leaderboard import show
from ray_jobs.objectives import Aims, ObjectiveConfig
from ray_jobs.record import COMPLETE, Entry
from ray_jobs.report import Report, read_report
from ray_jobs.reporting.page import to_html, write_html
from ray_jobs.reporting.study import ENOUGH, importances
from ray_jobs.space import Space
from tests.draw import Draw
from tests.ray_jobs.fake_sweep import BITS, FRACTION, KIND, LOSS, STATES, STEPS, aims, fake_sweep

RATE = "training.optimizer.learning_rate"
HOSTILE = "</script><script>evil()</script><img src=x onerror=evil()>\"'<!--<script>&lt;b&gt; ]]> \u2028"


class Page(HTMLParser):
    """What a browser would make of a page: its elements, its scripts, its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._script = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._script = tag == "script"
        if self._script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._script = False

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[-1] += data
        else:
            self.text += data

    @property
    def plots(self) -> dict[str, list[dict[str, Any]]]:
        plots: dict[str, list[dict[str, Any]]] = json.loads(self.scripts[0])
        return plots


def read(tracking: Tracking) -> Report:
    return read_report(tracking, "fake")


def states(draw: Draw, count: int) -> list[str]:
    return draw.random.choices(STATES, k=count)


def test_json_holds_curves_layers_cost_and_importances_of_every_trial(draw: Draw, tmp_path: Path) -> None:
    drawn = ["finished"] * ENOUGH + states(draw, 3) + ["running"]
    draw.random.shuffle(drawn)
    found = json.loads(read(fake_sweep(tmp_path, draw, drawn, aims(BITS, FRACTION))).to_json())
    reached = {"finished": 3, "failed": 1}
    assert len(found["trials"]) == len(drawn)
    for trial in found["trials"]:
        name = trial["trial_id"]
        curve = found["curves"][name]
        assert [step for step, _ in curve] == list(STEPS)[: reached.get(trial["state"], 2)]
        assert curve[-1][1] == trial["metrics"][BITS]
        assert [layer["settings"] for layer in found["layers"][name]] == [
            {"k": trial["params"][f"model.layers[{i}].k"]} for i in range(4)
        ]
        for i, layer in enumerate(found["layers"][name]):
            assert layer["metrics"]["k_mean"] == trial["metrics"][f"layer_{i}/k_mean"]
        assert found["cost"][name]["seconds"] == trial["metrics"]["training_seconds"]
    assert len(found["curves"]["baseline-dense"]) == len(STEPS)
    for shares in found["importances"]["objectives"].values():
        assert sum(shares.values()) == pytest.approx(1)
        assert set(shares) == {key for trial in found["trials"] for key in trial["params"]}
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert set(found["importances"]["objectives"]) == {BITS, FRACTION}


def test_cost_is_training_time_at_the_rates_of_the_sweep(draw: Draw, tmp_path: Path) -> None:
    rates = {"gpu_hours": 2.0, "money": 7.2}
    report = read(fake_sweep(tmp_path, draw, ["finished", "failed"], aims(BITS), rates=rates))
    spent = [report.cost[t["trial_id"]] for t in sorted(report.trials, key=lambda t: str(t["trial_id"]))]
    hours = [(10.0 + i) / 3600 for i in range(2)]
    assert [cost["seconds"] for cost in spent] == [10.0, 11.0]
    assert [cost["gpu_hours"] for cost in spent] == pytest.approx([2 * h for h in hours])
    assert [cost["money"] for cost in spent] == pytest.approx([7.2 * h for h in hours])
    assert {plot["title"] for plot in Page(to_html(report)).plots["cost"]} == {"seconds", "gpu hours", "money"}


@pytest.mark.slow
def test_what_breaks_a_constraint_is_marked_and_never_on_the_front(draw: Draw, tmp_path: Path) -> None:
    bound = draw.random.uniform(0.25, 0.4)
    constraints = [{"metric": FRACTION, "upper": bound}, {"metric": LOSS, "upper": 0.1, "relative_to": "dense"}]
    tracking = fake_sweep(
        tmp_path, draw, ["finished"] * 12 + ["stopped_early"], aims(BITS, FRACTION), constraints=constraints
    )
    report = read(tracking)
    dense = report.curves["baseline-dense"]
    assert dense
    for trial in report.trials:
        over = trial["metrics"][FRACTION] > bound or trial["metrics"][LOSS] > 1.4 + 40 / 300 + 0.1
        assert trial["feasible"] == (trial["state"] != "finished" or not over)
        assert trial["feasible"] or trial["trial_id"] not in report.pareto
    page = to_html(report)
    assert f"held_out_selected_fraction &lt;= {bound:g}" in page


def test_candidates_over_several_seeds_are_shown_with_whom_they_cannot_be_told_from(draw: Draw, tmp_path: Path) -> None:
    tracking = fake_sweep(tmp_path, draw, ["finished"] * 3, aims(LOSS), confirm=2)
    report = read(tracking)
    assert len(report.trials) == 3
    assert len(report.confirmed) == 2
    for one in report.confirmed:
        assert len(one["values"]) == 4
        assert one["mean"] == pytest.approx(sum(one["values"]) / 4)
        assert f"{one['mean']:.4f}" in to_html(report)
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    show(report, console)
    assert console.export_text().count("over 4 seeds") == 2


@pytest.mark.parametrize("sign", [1, -1])
def test_the_parameter_that_decides_stands_out(draw: Draw, sign: int) -> None:
    """What makes trials good, of two hundred, whichever way the objective points."""
    space = Space(FREE, plain())
    entries = trials_of(draw, space, 200)
    for entry in entries:  # the rate decides among the good, k among the bad
        distance = abs(float(entry.params[RATE]) - 4e-3)
        entry.values = [sign * (distance if distance < 1.6e-3 else 1 + entry.params["model.attention.controller.k"])]
    found = importances(entries, space, Aims([ObjectiveConfig(LOSS, "min" if sign == 1 else "max")]))
    assert next(iter(found.objectives[LOSS])) == RATE
    assert found.stands_out[LOSS][0] == RATE


def test_of_chance_alone_nothing_stands_out(draw: Draw) -> None:
    space = Space(FREE, plain())
    stood_out = 0
    for _ in range(10):
        entries = trials_of(draw, space, 20)
        for entry in entries:
            entry.values = [draw.random.random()]
        stood_out += bool(importances(entries, space, Aims([ObjectiveConfig(LOSS)])).stands_out[LOSS])
    assert stood_out <= 4  # at one in twenty, more have a probability of 1e-4


def test_there_are_no_importances_of_few_trials_nor_of_equal_ones(draw: Draw) -> None:
    space = Space(FREE, plain())
    entries = trials_of(draw, space, ENOUGH)
    for entry in entries:
        entry.values = [2.5]
    few = importances(entries[1:], space, Aims([ObjectiveConfig(LOSS)]))
    assert (few.objectives, few.trials) == ({}, ENOUGH - 1)
    assert f"{ENOUGH - 1} of at least {ENOUGH}" in few.note
    equal = importances(entries, space, Aims([ObjectiveConfig(LOSS)]))
    assert equal.objectives == {}
    assert LOSS in equal.note


@pytest.mark.parametrize(
    ("drawn", "objectives", "empty"),
    [
        ([], aims(BITS), {"history", "pareto", "importances", "layers"}),
        (["failed", "running"], aims(BITS, FRACTION), {"pareto", "history", "importances"}),
        (["finished"], aims(BITS, FRACTION), {"importances"}),
        (["finished"], aims(LOSS), {"pareto", "importances"}),
        (["finished"] * ENOUGH, aims(BITS, FRACTION, "tokens_per_second"), set()),
    ],
)
@pytest.mark.slow
def test_what_there_is_is_shown_and_what_there_is_not_is_said(
    draw: Draw, tmp_path: Path, drawn: list[str], objectives: list[dict[str, str]], empty: set[str]
) -> None:
    page = Page(to_html(read(fake_sweep(tmp_path, draw, drawn, objectives))))
    assert {name for name, found in page.plots.items() if not found} == empty
    assert len(page.plots["pareto"]) == (len(objectives) - 1 if "finished" in drawn else 0)
    shown = {str(a["id"]).removeprefix("plot-") for _, a in page.elements if str(a.get("id")).startswith("plot-")}
    one = "pareto" if len(objectives) == 1 else "history"
    assert shown == set(page.plots) - empty - {one}
    assert sum(a.get("class") == "empty" for _, a in page.elements) >= len(empty - {one})
    assert ("No trial came to its end." in page.text) == ("finished" not in drawn)


@pytest.mark.slow
def test_hostile_names_reasons_and_settings_stay_text(draw: Draw, tmp_path: Path) -> None:
    """No element, attribute or script comes from them; they are read as they were written."""
    kind = {"type": "categorical", "choices": ["fixed", "ratio"]}
    space = {KIND: kind}
    drawn = ["finished", "finished", "failed", "stopped_early"]
    tracking = fake_sweep(tmp_path / "hostile", draw, drawn, aims(BITS, FRACTION), reason=HOSTILE, space=space)
    mild = Page(to_html(read(fake_sweep(tmp_path / "mild", draw, drawn, aims(BITS, FRACTION), space=space))))
    report = read(tracking)
    for trial in report.trials:
        trial["params"] = {f"model.{HOSTILE}": HOSTILE}
        for layer in report.layers[trial["trial_id"]]:
            layer["settings"] = {HOSTILE: HOSTILE}
            layer["metrics"] = {HOSTILE: 1.0}
    rename(report, {t["trial_id"]: f"{t['trial_id']}{HOSTILE}" for t in report.trials})
    source = to_html(report)
    page = Page(source)
    known = {tag for tag, _ in mild.elements}
    assert {tag for tag, _ in page.elements} <= known
    assert "img" not in known
    assert len(page.scripts) == 3
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count(HOSTILE) >= len(drawn) + 1
    assert "evil()" not in page.scripts[1] + page.scripts[2]
    for text in labels(page.plots):  # plotly reads these as HTML
        assert "<img" not in text
        assert "<script" not in text


def test_only_the_scripts_of_the_page_may_run_and_nothing_is_loaded(draw: Draw, tmp_path: Path) -> None:
    page = Page(to_html(read(fake_sweep(tmp_path, draw, ["finished"], aims(BITS)))))
    (policy,) = [str(a["content"]) for t, a in page.elements if t == "meta" and "http-equiv" in a]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts[1:]]
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes
    assert policy.startswith("default-src 'none'")
    assert "script-src 'sha256" in policy
    assert not [a for t, a in page.elements if "src" in a or t == "link"]


def test_a_report_without_the_sweeps_configuration_says_so(draw: Draw, tmp_path: Path) -> None:
    tracking = fake_sweep(tmp_path, draw, ["finished"] * ENOUGH, aims(BITS))
    tracking.log_text(read(tracking).run_id, to_yaml(build(TrainConfig, {})), "config.yaml")
    report = read(tracking)
    assert report.importances.objectives == {}
    assert "config.yaml" in report.importances.note
    assert "config.yaml" in Page(to_html(report)).text
    assert all(layer["settings"] == {} for layers in report.layers.values() for layer in layers)


def test_the_terminal_names_what_matters(draw: Draw, tmp_path: Path) -> None:
    report = read(fake_sweep(tmp_path, draw, ["finished"] * ENOUGH, aims(BITS)))
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    show(report, console)
    text = console.export_text()
    assert f"importance for {BITS}: " in text
    assert ("learning_rate " in text.split("importance for")[1]) == (RATE in report.importances.stands_out[BITS])


def test_a_page_that_cannot_be_written_is_one_clear_line(draw: Draw, tmp_path: Path) -> None:
    report = read(fake_sweep(tmp_path, draw, [], aims(BITS)))
    with pytest.raises(RequestError, match="--html .*cannot be written"):
        write_html(report, tmp_path / "nowhere" / "report.html")


FREE: dict[str, Any] = {
    RATE: {"type": "float", "low": 1e-3, "high": 1e-2, "log": True},
    "model.attention.controller.k": {"type": "int", "low": 16, "high": 64, "step": 16},
    KIND: {"type": "categorical", "choices": ["fixed", "ratio"]},
    "model.attention.controller.ratio": {"type": "float", "low": 0.05, "high": 0.5, "when": {KIND: "ratio"}},
    "model.attention.gates.places": {"type": "categorical", "choices": [[], ["G1"], ["G1", "G2"]]},
}


def plain() -> dict[str, Any]:
    return dataclasses.asdict(build(TrainConfig, {}))


def trials_of(draw: Draw, space: Space, count: int) -> list[Entry]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=draw.random.randrange(2**31)))
    drawn = [space.sample(study.ask()) for _ in range(count)]
    return [Entry(str(i), params, space.settings(params), state=COMPLETE) for i, params in enumerate(drawn)]


def rename(report: Report, names: dict[str, str]) -> None:
    for trial in report.trials:
        trial["trial_id"] = names[trial["trial_id"]]
    report.pareto = [names[name] for name in report.pareto]
    report.best = names[report.best] if report.best else None
    report.curves = {names.get(name, name): curve for name, curve in report.curves.items()}
    report.layers = {names[name]: layers for name, layers in report.layers.items()}
    report.cost = {names.get(name, name): cost for name, cost in report.cost.items()}


def labels(value: Any) -> list[str]:
    """All texts of the figures; titles of choices stand apart, as options."""
    if isinstance(value, dict):
        return labels([inner for key, inner in value.items() if key != "title" or isinstance(inner, dict)])
    if isinstance(value, list):
        return [text for inner in value for text in labels(inner)]
    return [value] if isinstance(value, str) else []


def new_trial() -> dict[str, str]:
    return {"gsa.trial_id": "00009-new", "gsa.params": "{}", "gsa.baseline": "false"}
