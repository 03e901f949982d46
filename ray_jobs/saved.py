"""What stands on disk of a sweep, checked before it goes on: its settings, and the record of its trials.

Both are files that a user may have edited, mended or copied. What cannot be gone on with is refused here, before the
folder, MLflow or Ray are touched.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from gsa.config import TrainConfig, build, flatten, read_yaml
from gsa.errors import RequestError
from gsa.paths import SQLITE
from gsa.store import TrackingConfig, store_uri
from ray_jobs.dimensions import Dimension
from ray_jobs.halving import SchedulerConfig
from ray_jobs.record import COMPLETE, Entry, frozen_config, read
from ray_jobs.space import Space
from ray_jobs.studies import trial_id

T = TypeVar("T")

# what may be set anew when a sweep goes on
EXTENSIBLE = ("num_samples", "max_concurrent_trials", "max_failures", "confirm", "budget", "train.data.prepared")
# settings that results do not depend on: where they are kept
PLACES = ("train.storage", "train.tracking")


def read_settings(schema: type[T], folder: Path) -> T:
    """The settings of a sweep, as its folder holds them.

    Raises:
        RequestError: its `sweep.yaml` is not what a sweep has written there.
    """
    path = folder / "sweep.yaml"
    data = read_yaml(path)
    try:
        config = build(schema, data)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error
    name = getattr(config, "name", None)
    if name != folder.name:
        raise RequestError(f"{path}: name = {name!r}: must be the name of its folder, {folder.name!r}")
    return config


def frozen(config: Any) -> dict[str, Any]:
    """The settings of a sweep that it keeps for good, as plain data."""
    data = dataclasses.asdict(config)
    for key in (*EXTENSIBLE, *PLACES):
        *path, last = key.split(".")
        place = data
        for part in path:
            place = place[part]
        place.pop(last, None)
    return data


def is_free(key: str) -> bool:
    """Whether a setting may change from one life of a sweep to the next. MLflow's params may not."""
    return is_below(key, (*EXTENSIBLE, *PLACES))


def is_below(key: str, names: Iterable[str]) -> bool:
    """Whether a key is one of these, or a setting below one."""
    return any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in names)


def follow_move(train: TrainConfig, storage: str | Path) -> str | None:
    """Let a sweep's settings name the storage folder that it stands in now.

    Returns:
        The folder that they named, where it was another one.

    Raises:
        RequestError: the MLflow store to use is in the earlier folder, and is not there.
    """
    old, new = train.storage, os.path.abspath(storage)
    if old == new or (os.path.exists(old) and os.path.samefile(old, new)):
        return None
    train.storage = new
    if train.tracking.uri is not None and _below(train.tracking.uri, old):
        train.tracking.uri = SQLITE + os.path.join(new, os.path.relpath(train.tracking.uri.removeprefix(SQLITE), old))
    uri = store_uri(TrackingConfig(train.tracking.uri), new)
    if _below(uri, old) and not os.path.exists(uri.removeprefix(SQLITE)):
        raise RequestError(
            f"MLFLOW_TRACKING_URI = {uri!r}: is not there; {old} was moved to {new}: unset it, or name it"
        )
    return old


def _below(uri: str, folder: str) -> bool:
    return uri.startswith(SQLITE) and Path(uri.removeprefix(SQLITE)).is_relative_to(folder)


def check_record(config: Any, space: Space, folder: Path) -> None:
    """Hold a sweep's record to its settings.

    Args:
        config: the settings that the sweep is to go on with.
        space: the search space in them.
        folder: of the sweep.

    Raises:
        RequestError: the record is damaged or missing, a setting differs from what the sweep began with, or a trial is
            none that the sweep can have proposed.
    """
    path = folder / "record.jsonl"
    if not path.exists():
        if any((folder / "trials").glob("*/")):
            raise RequestError(f"{path}: is missing, and {folder / 'trials'} holds trials; restore it from a copy")
        return
    events, entries = read(path)
    began = frozen_config(events)
    if began is not None:
        _refuse_changed(config, began, folder / "sweep.yaml")
    try:
        _refuse_foreign(entries, space, config.scheduler)
    except ValueError as error:
        raise RequestError(f"{path}: {error}; what was sweep.yaml when the sweep began? Restore it") from error


def _refuse_changed(config: Any, began: dict[str, Any], path: Path) -> None:
    try:  # settings of a later version have their defaults
        before, now = _flat(build(type(config), began)), _flat(config)
    except RequestError as error:
        raise RequestError(f"{path.with_name('record.jsonl')}: the settings of the sweep: {error}") from error
    for key in [*now, *(key for key in before if key not in now)]:
        if before.get(key) != now.get(key) and not is_free(key):
            change = f"was {before.get(key)!r} when the sweep began, and cannot change"
            raise RequestError(f"{path}: {key} = {now.get(key)!r}: {change}; {', '.join(EXTENSIBLE)} can")


def _flat(config: Any) -> dict[str, Any]:
    """As `flatten`, and each dimension of the space by itself."""
    flat = flatten(config)
    return flat | {f"space.{key}": value for key, value in flat.pop("space").items()}


def _refuse_foreign(entries: Mapping[str, Entry], space: Space, scheduler: SchedulerConfig) -> None:
    """Raise ValueError for a trial that a sweep over this space cannot have."""
    number = 0
    for entry in entries.values():
        if entry.baseline:
            continue
        try:
            _refuse_outside(entry, space)
            if entry.until is not None and not scheduler.is_rung(entry.until):
                raise ValueError(f"pauses at step {entry.until}, which is no rung of sweep.yaml's scheduler")
            if entry.searched:
                _refuse_renamed(entry, number)
                number += 1
            if entry.confirms is not None and entry.confirms not in entries:
                raise ValueError(f"repeats {entry.confirms!r}, which is not in the record")
            if entry.state == COMPLETE and (entry.values is None or not entry.steps):
                raise ValueError("is COMPLETE without results")
        except ValueError as error:
            raise ValueError(f"trial {entry.trial_id!r} {error}") from error


def _refuse_outside(entry: Entry, space: Space) -> None:
    active = {dimension.key: dimension for dimension in space.dimensions if dimension.active(entry.params)}
    for key in [*entry.params, *active]:
        if key not in active:
            raise ValueError(f"has {key} = {entry.params[key]!r}, which the space of sweep.yaml does not search there")
        if key not in entry.params:
            raise ValueError(f"has no {key}, which the space of sweep.yaml searches")
        if not _contains(active[key], entry.params[key]):
            raise ValueError(f"has {key} = {entry.params[key]!r}, which is outside the space of sweep.yaml")
    expected = space.settings(entry.params)
    settings = {key: value for key, value in entry.settings.items() if entry.confirms is None or key != "seed"}
    for key in [*settings, *expected]:
        if settings.get(key) != expected.get(key):
            raise ValueError(f"sets {key} = {settings.get(key)!r}, where its parameters make it {expected.get(key)!r}")


def _contains(dimension: Dimension, value: Any) -> bool:
    distribution = dimension.distribution()
    try:
        return bool(distribution._contains(distribution.to_internal_repr(dimension.internal(value))))
    except (ValueError, TypeError):  # of another type, or none of the choices
        return False


def _refuse_renamed(entry: Entry, number: int) -> None:
    """A searched trial's name holds its number and what it tries: lost, doubled and changed proposals show in it."""
    expected = trial_id(number, entry.params)
    if entry.trial_id != expected:
        raise ValueError(f"stands where {expected!r} was proposed")
