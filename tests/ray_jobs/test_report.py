"""A report of a sweep whose runs were deleted, edited or added to in MLflow."""

import io
import json
from pathlib import Path

import pytest
from mlflow.entities import Run
from rich.console import Console

from gsa.errors import RequestError
from gsa.tracking import OBJECTIVES, PARENT, Tracking
from ray_jobs.leaderboard import show
from ray_jobs.objectives import Aims, ObjectiveConfig
from ray_jobs.report import read_report
from ray_jobs.reporting.page import to_html
from ray_jobs.reporting.recorded import CONSTRAINTS, RATES
from ray_jobs.space import Space
from ray_jobs.warm_start import matching
from tests.draw import Draw
from tests.ray_jobs.fake_sweep import LOSS, SPACE, aims, fake_sweep
from tests.ray_jobs.play import BASE


def runs(tracking: Tracking) -> dict[str, Run]:
    return {run.data.tags.get("gsa.trial_id", "sweep"): run for run in tracking.runs()}


@pytest.mark.slow
def test_what_is_missing_is_said_and_the_rest_is_reported(draw: Draw, tmp_path: Path) -> None:
    tracking = fake_sweep(tmp_path, draw, ["finished"] * 10, aims(LOSS), confirm=3, rates={"money": 1.0})
    client, before, found = tracking.client, read_report(tracking, "fake"), runs(tracking)
    assert before.notes == []
    assert len(before.confirmed) == 3
    trials = sorted(trial_id for trial_id in found if trial_id[:5].isdecimal() and "-seed" not in trial_id)
    original, unmeasured, broken, listed, odd = (*trials[:2], *trials[4:7])
    client.delete_run(found[original].info.run_id)
    client.set_tag(found[broken].info.run_id, "gsa.params", "{not JSON")
    client.set_tag(found[listed].info.run_id, "gsa.params", "[1]")
    client.delete_tag(found[odd].info.run_id, "gsa.params")
    client.set_tag(found["sweep"].info.run_id, RATES, "free")
    by_hand = client.create_run(tracking.experiment_id, run_name="mine", tags={PARENT: before.run_id}).info.run_id
    report = read_report(tracking, "fake")
    notes = "\n".join(report.notes)
    assert f"run 'mine' ({by_hand}) is no trial of this sweep: it has no tag gsa.trial_id; left out" in notes
    assert f"run {broken!r} ({found[broken].info.run_id}): its tag gsa.params is '{{not JSON', which is not" in notes
    assert f"{found[listed].info.run_id}): its tag gsa.params is '[1]'" in notes
    assert f"{found[odd].info.run_id}): its tag gsa.params is missing; left out" in notes
    assert f"trial {original} was repeated with 3 other seeds, but its own run, or {LOSS} of it, is not in" in notes
    assert "its tag gsa.rates is 'free'" in notes
    assert len(report.notes) == 6
    assert {t["trial_id"] for t in report.trials} == set(trials) - {original, broken, listed, odd}
    kept = [one for one in before.confirmed if one["trial_id"] != original]
    assert report.confirmed == kept
    assert unmeasured in {one["trial_id"] for one in kept}
    shown = io.StringIO()
    show(report, Console(file=shown, width=400))
    assert all(f"note: {note}" in shown.getvalue() for note in report.notes)
    assert "it has no tag gsa.trial_id; left out" in to_html(report)
    assert matching(tracking, "fake", Space(SPACE, BASE), Aims([ObjectiveConfig(LOSS)])).trials == 6


@pytest.mark.parametrize("tag", [OBJECTIVES, CONSTRAINTS])
@pytest.mark.parametrize("value", ["not JSON", "{}", "[1]", json.dumps([{"no": "metric"}])])
def test_a_sweep_whose_aims_were_edited_is_refused_by_name(draw: Draw, tmp_path: Path, tag: str, value: str) -> None:
    tracking = fake_sweep(tmp_path, draw, ["finished"], aims(LOSS))
    run_id = runs(tracking)["sweep"].info.run_id
    tracking.client.set_tag(run_id, tag, value)
    with pytest.raises(RequestError, match=rf"^run 'fake' \({run_id}\): its tag {tag} is "):
        read_report(tracking, "fake")


def test_a_sweep_of_which_all_trials_were_deleted_is_empty(draw: Draw, tmp_path: Path) -> None:
    tracking = fake_sweep(tmp_path, draw, ["finished"] * 2, aims(LOSS), confirm=1)
    for name, run in runs(tracking).items():
        if name != "sweep":
            tracking.client.delete_run(run.info.run_id)
    report = read_report(tracking, "fake")
    assert (report.trials, report.best, report.confirmed) == ([], None, [])
    show(report, Console(file=io.StringIO()))
