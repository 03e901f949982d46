"""A sweep's trials as other tools read them."""

import json
from pathlib import Path

import optuna
import pyarrow.parquet
import pytest
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from gsa.errors import RequestError
from ray_jobs.export import export_study, write_parquet
from ray_jobs.report import Report, read_report
from ray_jobs.reporting.study import Importances, read_space
from tests.draw import Draw
from tests.ray_jobs.fake_sweep import BITS, FRACTION, KIND, STATES, aims, fake_sweep

PLACES = "model.attention.gates.places"
TOLD = {
    "finished": TrialState.COMPLETE,
    "stopped_early": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "killed": TrialState.FAIL,
    "running": TrialState.RUNNING,
}


def states(draw: Draw) -> list[str]:
    drawn = [*TOLD, *draw.random.choices(STATES, k=5)]
    draw.random.shuffle(drawn)
    return drawn


def opened(target: str) -> BaseStorage:
    return RDBStorage(target) if "://" in target else JournalStorage(JournalFileBackend(target))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["sqlite:///{}/study.db", "{}/study.journal"])
@pytest.mark.parametrize("objectives", [aims(BITS), aims(BITS, "tokens_per_second")])
def test_an_optuna_study_holds_every_trial_as_it_ended(
    draw: Draw, tmp_path: Path, place: str, objectives: list[dict[str, str]]
) -> None:
    tracking = fake_sweep(tmp_path, draw, states(draw), objectives)
    report, target = read_report(tracking, "fake"), place.format(tmp_path)
    export_study(tracking, report, target)
    study = optuna.load_study(study_name="fake", storage=opened(target))
    space = {dimension.key: dimension for dimension in read_space(tracking, report.run_id).dimensions}
    assert [d.name for d in study.directions] == ["MINIMIZE", "MAXIMIZE"][: len(objectives)]
    assert study.metric_names == [o["metric"] for o in objectives]
    trials = sorted(report.trials, key=lambda t: str(t["trial_id"]))
    for trial, told in zip(trials, study.trials, strict=True):
        assert told.state == TOLD[trial["state"]]
        assert told.params == {key: space[key].internal(value) for key, value in trial["params"].items()}
        assert told.distributions == {key: space[key].distribution() for key in trial["params"]}
        assert told.user_attrs["trial_id"] == trial["trial_id"]
        assert told.user_attrs.get("reason", "") == trial["reason"]
        assert told.user_attrs[FRACTION] == trial["metrics"][FRACTION]
        assert told.datetime_start is not None
        assert told.datetime_start.timestamp() == pytest.approx(trial["start_time"] / 1000, abs=1e-3)
        if told.state == TrialState.COMPLETE:
            assert told.values == [trial["metrics"][o["metric"]] for o in objectives]
        curve = dict(report.curves[trial["trial_id"]])
        assert told.intermediate_values == (curve if len(objectives) == 1 else {})
    study.ask({key: dimension.distribution() for key, dimension in space.items()})  # a sampler can go on from it


@pytest.mark.slow
def test_an_export_goes_nowhere_where_it_cannot_be_right(draw: Draw, tmp_path: Path) -> None:
    tracking = fake_sweep(tmp_path, draw, ["finished"], aims(BITS))
    report, target = read_report(tracking, "fake"), f"sqlite:///{tmp_path / 'study.db'}"
    export_study(tracking, report, target)
    with pytest.raises(RequestError, match="holds a study 'fake' already"):
        export_study(tracking, report, target)
    assert len(optuna.load_study(study_name="fake", storage=target).trials) == 1
    for wrong in (f"sqlite:///{tmp_path}/nowhere/study.db", f"{tmp_path}/nowhere/study", "nonsense://study"):
        with pytest.raises(RequestError, match="cannot be written") as refused:
            export_study(tracking, report, wrong)
        assert "\n" not in str(refused.value)
    with pytest.raises(RequestError, match="--parquet .*cannot be written"):
        write_parquet(report, tmp_path / "nowhere" / "trials.parquet")


def test_a_table_has_one_row_a_trial(draw: Draw, tmp_path: Path) -> None:
    report = read_report(fake_sweep(tmp_path, draw, states(draw), aims(BITS, FRACTION)), "fake")
    write_parquet(report, tmp_path / "trials.parquet")
    rows = pyarrow.parquet.read_table(tmp_path / "trials.parquet").to_pylist()
    assert len(rows) == len(report.trials)
    for row, trial in zip(rows, report.trials, strict=True):
        assert row["pareto"] == (trial["trial_id"] in report.pareto)
        for own in ("trial_id", "run_id", "state", "reason", "checkpoint"):
            assert row[own] == trial[own]
        assert row["seconds"] == trial["metrics"]["training_seconds"]
        for key in (KIND, "model.layers[0].k", "training.optimizer.learning_rate", "model.attention.controller.ratio"):
            assert row[f"params.{key}"] == trial["params"].get(key)
        assert json.loads(row[f"params.{PLACES}"]) == trial["params"][PLACES]
        for name, value in trial["metrics"].items():
            assert row[f"metrics.{name}"] == value


def test_a_table_of_no_trials_has_the_columns_of_all(tmp_path: Path) -> None:
    nothing = Report("fake", aims(BITS), [], {}, [], [], None, "", Importances({}, {}, 0, ""), {}, {}, {}, [], [], [])
    write_parquet(nothing, tmp_path / "trials.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "trials.parquet")
    assert table.num_rows == 0
    assert {"trial_id", "state", "seconds"} <= set(table.column_names)
