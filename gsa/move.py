"""Runs of one MLflow store, copied to another: each parameter, metric value, tag, dataset, artifact and model version.

Run ids are given anew there, as MLflow allows no other way: the tag `gsa.moved_from` keeps the old one, and by it a
move that was cut short goes on where it was. The store that is copied from is not changed.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from gsa.errors import RequestError, RunError, one_line
from gsa.store import TrackingConfig
from gsa.tracking import KEY, PARENT, Store, Tracking, connect, every_page
from gsa.tracking.limits import batches

MOVED_FROM, WHOLE = "gsa.moved_from", "gsa.moved_whole"


@dataclasses.dataclass
class Moved:
    """What is in the other store now."""

    runs: int = 0
    earlier: int = 0  # of them by an earlier move
    values: int = 0  # of metrics, in this move
    files: int = 0
    versions: int = 0  # of models


def move(source: Store, destination: Tracking, told: Callable[[str], None]) -> Moved:
    """Copy every run of every experiment; `told` takes a line for each.

    Raises:
        RequestError: a run is still running, or the other store has runs of the same key from elsewhere; nothing was
            copied.
        RunError: the other store did not take something; what it took is complete, and the same call goes on.
    """
    old = source.client
    experiments = {e.name: Tracking(source.uri, e.experiment_id) for e in every_page(old.search_experiments)}
    runs = {name: experiment.runs() for name, experiment in experiments.items()}
    total = sum(map(len, runs.values()))
    _refuse_running([run for some in runs.values() for run in some])
    places = {name: connect(TrackingConfig(destination.uri, name), ".") for name, some in runs.items() if some}
    there = {name: {_moved_from(run): run for run in place.runs()} for name, place in places.items()}
    for name, copies in there.items():
        _refuse_other(runs[name], copies)
    moved = Moved()
    ids: dict[str, str] = {}
    try:
        for name, place in places.items():
            for run in sorted(runs[name], key=lambda run: PARENT in run.data.tags):  # parents first: children name them
                ids[run.info.run_id] = _copy(old, place, run, there[name].get(run.info.run_id), ids, moved)
                told(f"{name}: {run.info.run_name} ({moved.runs} of {total})")
        _copy_models(old, destination, ids, moved)
    except MlflowException as error:
        again = "the same command goes on from there"
        raise RunError(f"{destination.uri} did not take all of it ({one_line(error)}); {again}") from error
    return moved


def _copy(old: MlflowClient, place: Tracking, run: Run, found: Run | None, ids: dict[str, str], moved: Moved) -> str:
    """The id of a run's copy, which is complete then."""
    moved.runs += 1
    if found is not None and WHOLE in found.data.tags:
        moved.earlier += 1
        return str(found.info.run_id)
    new, experiment = place.client, place.experiment_id
    tags = dict(run.data.tags) | {MOVED_FROM: run.info.run_id}
    if PARENT in tags:
        tags[PARENT] = ids.get(tags[PARENT], tags[PARENT])
    copy = found or new.create_run(experiment, start_time=run.info.start_time, tags=tags, run_name=run.info.run_name)
    copy_id = str(copy.info.run_id)
    place.log_params(copy_id, [Param(key, value) for key, value in run.data.params.items()])
    values = [Metric(m.key, m.value, m.timestamp, m.step) for m in _values(old, run)]
    for batch in batches(values):  # those that are there already are not doubled
        new.log_batch(copy_id, batch.metrics)
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


def _copy_models(old: MlflowClient, destination: Tracking, ids: dict[str, str], moved: Moved) -> None:
    new = destination.client
    known = {model.name for model in every_page(new.search_registered_models)}
    for model in every_page(old.search_registered_models):
        if model.name not in known:
            new.create_registered_model(model.name, model.tags, model.description)
        named = f"name = '{model.name}'"
        there = {version.tags.get(MOVED_FROM) for version in every_page(partial(new.search_model_versions, named))}
        versions = every_page(partial(old.search_model_versions, named))
        for version in sorted(versions, key=lambda version: int(version.version)):
            origin = f"{model.name}/{version.version}"
            if origin not in there and version.run_id in ids:
                destination.register(ids[version.run_id], model.name, version.tags | {MOVED_FROM: origin})
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


def _moved_from(run: Run) -> str:
    return str(run.data.tags.get(MOVED_FROM, run.info.run_id))
