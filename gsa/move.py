"""Runs of one MLflow store, copied to another: each parameter, metric value, tag, dataset, artifact and model version.

Run ids are given anew there, as MLflow allows no other way: the tag `gsa.moved_from` keeps the old one, and by it a
move that was cut short goes on where it was. The store that is copied from is not changed.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Experiment, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from gsa.errors import RequestError, RunError, one_line
from gsa.tracking import KEY, METRICS_AT_ONCE, PARAMS_AT_ONCE, PARENT, Tracking

MOVED_FROM, WHOLE = "gsa.moved_from", "gsa.moved_whole"
PAGE = 1000  # runs that are asked for at once


@dataclasses.dataclass
class Moved:
    """What is in the other store now."""

    runs: int = 0
    earlier: int = 0  # of them by an earlier move
    values: int = 0  # of metrics, in this move
    files: int = 0
    versions: int = 0  # of models


def move(source: Tracking, destination: Tracking, told: Callable[[str], None]) -> Moved:
    """Copy every run of every experiment; `told` takes a line for each.

    Raises:
        RequestError: a run is still running, or the other store has runs of the same key from elsewhere; nothing was
            copied.
        RunError: the other store did not take something; what it took is complete, and the same call goes on.
    """
    old, new = source.client, destination.client
    experiments = [(experiment, _runs(old, experiment.experiment_id)) for experiment in old.search_experiments()]
    _refuse_running([run for _, runs in experiments for run in runs])
    places = {experiment.name: _place(new, experiment) for experiment, runs in experiments if runs}
    there = {name: {_moved_from(run): run for run in _runs(new, place)} for name, place in places.items()}
    for experiment, runs in experiments:
        _refuse_other(runs, there.get(experiment.name, {}))
    moved = Moved()
    ids: dict[str, str] = {}
    try:
        for experiment, runs in experiments:
            for run in sorted(runs, key=lambda run: PARENT in run.data.tags):  # parents first: children name them
                found = there[experiment.name].get(run.info.run_id)
                ids[run.info.run_id] = _copy(old, new, run, found, places[experiment.name], ids, moved)
                told(f"{experiment.name}: {run.info.run_name} ({moved.runs} of {sum(len(r) for _, r in experiments)})")
        _copy_models(old, new, ids, moved)
    except MlflowException as error:
        again = "the same command goes on from there"
        raise RunError(f"{destination.uri} did not take all of it ({one_line(error)}); {again}") from error
    return moved


def _copy(
    old: MlflowClient, new: MlflowClient, run: Run, found: Run | None, place: str, ids: dict[str, str], moved: Moved
) -> str:
    """The id of a run's copy, which is complete then."""
    moved.runs += 1
    if found is not None and WHOLE in found.data.tags:
        moved.earlier += 1
        return str(found.info.run_id)
    tags = dict(run.data.tags) | {MOVED_FROM: run.info.run_id}
    if PARENT in tags:
        tags[PARENT] = ids.get(tags[PARENT], tags[PARENT])
    copy = found or new.create_run(place, start_time=run.info.start_time, tags=tags, run_name=run.info.run_name)
    copy_id = str(copy.info.run_id)
    params = [Param(key, value) for key, value in run.data.params.items()]
    for first in range(0, len(params), PARAMS_AT_ONCE):
        new.log_batch(copy_id, params=params[first : first + PARAMS_AT_ONCE])
    values = [Metric(m.key, m.value, m.timestamp, m.step) for m in _values(old, run)]
    for first in range(0, len(values), METRICS_AT_ONCE):  # those that are there already are not doubled
        new.log_batch(copy_id, values[first : first + METRICS_AT_ONCE])
    if run.inputs is not None and run.inputs.dataset_inputs:
        new.log_inputs(copy_id, run.inputs.dataset_inputs)
    moved.values += len(values)
    moved.files += _copy_artifacts(old, new, run.info.run_id, copy_id)
    _refuse_incomplete(new, run, copy_id, values)
    new.set_terminated(copy_id, run.info.status, run.info.end_time)
    new.log_batch(copy_id, tags=[RunTag(WHOLE, "true")])
    return copy_id


def _copy_artifacts(old: MlflowClient, new: MlflowClient, run_id: str, copy_id: str) -> int:
    if not old.list_artifacts(run_id):
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(old.download_artifacts(run_id, "", name))
        new.log_artifacts(copy_id, str(folder))
        files = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    there = dict(_files(new, copy_id))
    if files != there:
        raise RunError(f"run {run_id}: artifacts differ after the copy: {sorted(files.items() ^ there.items())[:3]}")
    return len(files)


def _copy_models(old: MlflowClient, new: MlflowClient, ids: dict[str, str], moved: Moved) -> None:
    for model in old.search_registered_models():
        versions = sorted(old.search_model_versions(f"name = '{model.name}'"), key=lambda v: int(v.version))
        try:
            there = {v.tags.get(MOVED_FROM) for v in new.search_model_versions(f"name = '{model.name}'")}
            new.get_registered_model(model.name)
        except MlflowException:
            there = set()
            new.create_registered_model(model.name, model.tags, model.description)
        for version in versions:
            origin = f"{model.name}/{version.version}"
            if origin not in there and version.run_id in ids:
                copy = ids[version.run_id]
                source = f"{new.get_run(copy).info.artifact_uri}/checkpoint"
                new.create_model_version(model.name, source, copy, version.tags | {MOVED_FROM: origin})
                moved.versions += 1


def _refuse_running(runs: list[Run]) -> None:
    for run in runs:
        if run.info.status == "RUNNING":
            raise RequestError(f"run {run.info.run_name!r} is running: end it first, or resume its sweep to its end")


def _refuse_other(runs: list[Run], there: dict[str, Run]) -> None:
    """Raises where a run of the same key came there otherwise."""
    keys = {run.data.tags[KEY]: run.info.run_id for run in runs if KEY in run.data.tags}
    for origin, run in there.items():
        mine = keys.get(run.data.tags.get(KEY, ""))
        if mine is not None and mine != origin:
            raise RequestError(
                f"{run.data.tags[KEY]!r} is in the other store already, and was not moved there from here"
            )


def _refuse_incomplete(new: MlflowClient, run: Run, copy_id: str, values: list[Metric]) -> None:
    copy = new.get_run(copy_id)
    if copy.data.params != run.data.params:
        raise RunError(f"run {run.info.run_id}: parameters differ after the copy")
    sent = sorted((m.key, m.step, m.timestamp, m.value) for m in values)
    taken = sorted((m.key, m.step, m.timestamp, m.value) for m in _values(new, copy))
    if sent != taken:
        raise RunError(f"run {run.info.run_id}: {len(sent)} values of metrics were sent, {len(taken)} are there")


def _values(client: MlflowClient, run: Run) -> Iterator[Metric]:
    for key in run.data.metrics:
        yield from client.get_metric_history(run.info.run_id, key)


def _files(client: MlflowClient, run_id: str, path: str = "") -> Iterator[tuple[str, int | None]]:
    for entry in client.list_artifacts(run_id, path):
        if entry.is_dir:
            yield from _files(client, run_id, entry.path)
        else:
            yield entry.path, entry.file_size


def _runs(client: MlflowClient, experiment_id: str) -> list[Run]:
    runs, token = [], None
    while True:
        page: Any = client.search_runs([experiment_id], max_results=PAGE, order_by=["start_time ASC"], page_token=token)
        runs += list(page)
        token = page.token
        if not token:
            return runs


def _place(client: MlflowClient, experiment: Experiment) -> str:
    found = client.get_experiment_by_name(experiment.name)
    return str(found.experiment_id if found else client.create_experiment(experiment.name))


def _moved_from(run: Run) -> str:
    return str(run.data.tags.get(MOVED_FROM, run.info.run_id))
