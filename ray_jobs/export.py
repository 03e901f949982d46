"""A sweep's trials in the forms that other tools read: a parquet file, an Optuna storage.

optuna-dashboard sqlite:///study.db           # after gsa report NAME --optuna sqlite:///study.db
pandas.read_parquet("trials.parquet")         # after gsa report NAME --parquet trials.parquet
"""

import datetime
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import optuna
import pyarrow
import pyarrow.parquet
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial
from sqlalchemy.exc import SQLAlchemyError

from gsa.errors import RequestError
from gsa.paths import absolute_uri, of_user
from gsa.tracking import Tracking
from ray_jobs.report import Report
from ray_jobs.reporting.study import entry_of, read_space
from ray_jobs.studies import directions, optuna_trial

OWN = {
    "trial_id": pyarrow.string(),
    "run_id": pyarrow.string(),
    "state": pyarrow.string(),
    "pareto": pyarrow.bool_(),
    "feasible": pyarrow.bool_(),
    "seconds": pyarrow.float64(),
    "checkpoint": pyarrow.string(),
    "reason": pyarrow.string(),
}


def write_parquet(report: Report, path: Path) -> None:
    """One row a trial, best first, named as by `mlflow.search_runs`: `params.<key>`, `metrics.<name>`; null where a
    trial has none. Parameters that are lists, or of several types, are their JSON.

    Raises:
        RequestError: the file cannot be written.
    """
    rows = report.trials
    own = {name: pyarrow.array([_own(report, trial, name) for trial in rows], type=kind) for name, kind in OWN.items()}
    params = {f"params.{k}": _column([t["params"].get(k) for t in rows]) for k in _keys(t["params"] for t in rows)}
    metrics = {
        f"metrics.{k}": pyarrow.array([t["metrics"].get(k) for t in rows], type=pyarrow.float64())
        for k in _keys(t["metrics"] for t in rows)
    }
    try:
        pyarrow.parquet.write_table(pyarrow.table(own | params | metrics), path)
    except OSError as error:
        raise RequestError(f"--parquet {path}: cannot be written ({error})") from error


def export_study(tracking: Tracking, report: Report, target: str) -> None:
    """Write a sweep as an Optuna study of the sweep's name, in order of its trials.

    Args:
        target: a database URL (`sqlite:///study.db`), or the path of a journal file.

    Raises:
        RequestError: the sweep's configuration is not in the store, the target cannot be written, or it holds a study
            of this name.
    """
    aims, space = report.aims(), read_space(tracking, report.run_id)
    objectives = aims.objectives
    trials = []
    for trial in sorted(report.trials, key=lambda t: str(t["trial_id"])):
        entry = entry_of(trial, objectives, report.curves[trial["trial_id"]], space)
        frozen = optuna_trial(entry, space, aims, trial["violations"])
        _add_user_attrs(frozen, trial, entry.reason)
        _set_times(frozen, trial)
        trials.append(frozen)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)  # names of metrics
    try:
        study = optuna.create_study(
            storage=_storage(target), study_name=report.sweep, directions=directions(objectives)
        )
        study.set_metric_names([o.metric for o in objectives])
        study.add_trials(trials)
    except DuplicatedStudyError:
        raise RequestError(f"--optuna {target}: holds a study {report.sweep!r} already; name another place") from None
    except (OSError, ImportError, StorageInternalError, SQLAlchemyError) as error:
        raise RequestError(f"--optuna {target}: cannot be written ({str(error).splitlines()[0]})") from error


def _storage(target: str) -> BaseStorage:
    if "://" in target:
        return RDBStorage(absolute_uri(target))
    path = Path(of_user(target))
    if path.exists() and path.stat().st_size and not path.read_bytes()[:12].startswith(b'{"op_code"'):
        raise OSError("it is there, and is not an Optuna journal")  # which would be appended to
    return JournalStorage(JournalFileBackend(str(path)))


def _add_user_attrs(frozen: FrozenTrial, trial: dict[str, Any], reason: str) -> None:
    known = {name: trial[name] for name in ("trial_id", "run_id", "checkpoint")} | {"reason": reason}
    for name, value in (known | trial["metrics"]).items():
        if value not in (None, ""):
            frozen.set_user_attr(name, value)


def _set_times(frozen: FrozenTrial, trial: dict[str, Any]) -> None:
    frozen.datetime_start = datetime.datetime.fromtimestamp(trial["start_time"] / 1000)
    if frozen.state.is_finished():
        frozen.datetime_complete = datetime.datetime.fromtimestamp((trial["end_time"] or trial["start_time"]) / 1000)


def _own(report: Report, trial: dict[str, Any], name: str) -> Any:
    if name == "pareto":
        return trial["trial_id"] in report.pareto
    if name == "seconds":
        return report.cost[trial["trial_id"]].get("seconds")
    return trial[name]


def _keys(rows: Iterable[dict[str, Any]]) -> list[str]:
    return sorted({key for row in rows for key in row})


def _column(values: list[Any]) -> "pyarrow.Array[Any]":
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return pyarrow.array(values, type=pyarrow.float64())
    if len(kinds) == 1 and kinds < {bool, int, float, str}:
        return pyarrow.array(values)
    return pyarrow.array([None if value is None else json.dumps(value) for value in values], type=pyarrow.string())
