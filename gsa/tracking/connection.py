"""Opens a store: to read, which makes nothing, or to write, which makes the experiment."""

import contextlib
import json
import logging
import re
import shlex
import sqlite3
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import mlflow
from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.entities import Experiment, LifecycleStage, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking._tracking_service import utils
from sqlalchemy.exc import SQLAlchemyError

from gsa.errors import RequestError, one_line
from gsa.paths import database_of
from gsa.relocate import relocate
from gsa.settings import nearest
from gsa.store import TrackingConfig, refuse_unreachable, store_uri
from gsa.tracking.runs import KEY, Tracking
from gsa.tracking.store import Store, every_page

logger = logging.getLogger(__name__)

MEMORY = "mlflow.json"  # in a run's folder: where it is logged
HEADER = b"SQLite format 3\0"  # of every SQLite file
PATIENCE = 120.0  # seconds that another process may take to make the tables
EXPERIMENTS_AT_ONCE = 100  # that are searched in one request


def open_store(config: TrackingConfig, storage: str | Path) -> Store:
    """Open a store that is there already, whatever experiments it has; to read it makes nothing.

    Raises:
        RequestError: there is no store, or it cannot be reached.
    """
    uri = store_uri(config, storage)
    database = database_of(uri)
    with _explained(uri):
        if database is None:
            refuse_unreachable(uri)
        elif not _has_tables(database):
            raise RequestError(f"{uri}: no runs are stored there; --storage or --tracking-uri name another place")
        else:
            _follow(database)
        store = Store(uri)
        store.client.search_experiments(max_results=1)  # opens it
        return store


def open_experiment(config: TrackingConfig, storage: str | Path) -> Tracking:
    """Open an experiment that is there already, to read it.

    Raises:
        RequestError: there is no such store or experiment, or the experiment was deleted.
    """
    store = open_store(config, storage)
    with _explained(store.uri):
        found = store.client.get_experiment_by_name(config.experiment)
        if found is None:
            known = sorted(e.name for e in every_page(store.client.search_experiments))
            hint = nearest(config.experiment, known) or f"; known: {', '.join(known)}"
            raise RequestError(f"experiment {config.experiment!r}: is not in {store.uri}{hint}")
        _refuse_deleted(found, store.uri)
        return Tracking(store.uri, found.experiment_id)


def open_run(config: TrackingConfig, storage: str | Path, key: str, experiment: str | None = None) -> Tracking:
    """Open the experiment that holds the run with a key, whatever it is called by now.

    Args:
        config: the store; its experiment is not looked at.
        storage: folder of runs.
        key: of the run.
        experiment: look in this one only.

    Raises:
        RequestError: there is no such store or experiment, several hold such a run, or the one that does was deleted.
    """
    if experiment is not None:
        return open_experiment(TrackingConfig(config.uri, experiment), storage)
    store = open_store(config, storage)
    with _explained(store.uri):
        ask = partial(store.client.search_experiments, ViewType.ALL)
        experiments = {e.experiment_id: e for e in every_page(ask)}
        holding = _holding(store.client, experiments, key)
        active = [e for e in holding if e.lifecycle_stage == LifecycleStage.ACTIVE]
        if len(active) > 1:
            names = ", ".join(sorted(e.name for e in active))
            raise RequestError(f"{key.rstrip('/')!r}: is in several experiments of {store.uri}; --experiment: {names}")
        if holding and not active:
            _refuse_deleted(holding[0], store.uri)
    if active:
        return Tracking(store.uri, active[0].experiment_id)
    return open_experiment(TrackingConfig(config.uri, config.experiment), storage)


def connect(config: TrackingConfig, storage: str | Path, folder: Path | None = None) -> Tracking:
    """Open an experiment to write to it: made where there is none, restored where it was deleted.

    Args:
        config: the store, and the name of the experiment.
        storage: folder of runs.
        folder: of a run or sweep. One that was logged before (`remember`) goes on in its experiment, whatever that is
            called by now.

    Raises:
        RequestError: the store cannot be reached, or is none.
    """
    uri = store_uri(config, storage)
    database = database_of(uri)
    if database is None:
        refuse_unreachable(uri)
    else:
        _refuse_foreign(database, uri)
        try:
            database.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"tracking.uri = {uri!r}: its folder cannot be made ({error})") from error
        _follow(database)
    with _explained(uri), _made_once(database):
        client = MlflowClient(uri)
        found = _remembered(client, uri, folder) or client.get_experiment_by_name(config.experiment)
        if found is None:
            artifacts = (database.parent / "artifacts").as_uri() if database is not None else None
            found = _create(client, config.experiment, artifacts)
        if found.lifecycle_stage != LifecycleStage.ACTIVE:
            _restore(client, found)
        return Tracking(uri, found.experiment_id)


def _follow(database: Path) -> None:
    """Have artifacts looked for where the folder of a store is now, whichever process has moved it."""
    relocate(database)
    utils._artifact_repos_cache.clear()  # MLflow keeps the place of each run's artifacts as long as a process lives


def remember(tracking: Tracking, folder: Path) -> None:
    """Note in the folder of a run or sweep where it is logged."""
    unfinished = folder / f".{MEMORY}"
    note = {"uri": tracking.uri, "experiment_id": tracking.experiment_id}
    unfinished.write_text(json.dumps(note), encoding="utf-8")
    unfinished.rename(folder / MEMORY)


def _remembered(client: MlflowClient, uri: str, folder: Path | None) -> Experiment | None:
    """The experiment in which a run was logged, if it is in this store."""
    try:
        note = json.loads((folder / MEMORY).read_text(encoding="utf-8")) if folder is not None else None
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(note, dict) or note.get("uri") != uri:
        return None
    try:
        return client.get_experiment(str(note.get("experiment_id")))
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def _create(client: MlflowClient, name: str, artifacts: str | None) -> Experiment:
    try:
        return client.get_experiment(client.create_experiment(name, artifact_location=artifacts))
    except MlflowException as error:
        # another first run may have made it since this one looked
        found = client.get_experiment_by_name(name) if error.error_code == "RESOURCE_ALREADY_EXISTS" else None
        if found is None:
            raise
        return found


def _restore(client: MlflowClient, experiment: Experiment) -> None:
    try:
        client.restore_experiment(experiment.experiment_id)
    except MlflowException:
        # another run may have restored it since this one looked
        if client.get_experiment(experiment.experiment_id).lifecycle_stage != LifecycleStage.ACTIVE:
            raise
    else:
        logger.warning("experiment %r had been deleted in MLflow: restored, with its runs", experiment.name)


def _refuse_deleted(experiment: Experiment, uri: str) -> None:
    if experiment.lifecycle_stage != LifecycleStage.ACTIVE:
        remedy = f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
        raise RequestError(
            f"experiment {experiment.name!r}: was deleted in {uri}; to restore it: MLFLOW_TRACKING_URI={uri} {remedy}"
        )


def _holding(client: MlflowClient, experiments: dict[str, Experiment], key: str) -> list[Experiment]:
    """The experiments that hold a run with this key; in a deleted one, its runs are deleted too."""
    if "'" in key:
        return []
    ids = list(experiments)
    found = set()
    for first in range(0, len(ids), EXPERIMENTS_AT_ONCE):
        part = ids[first : first + EXPERIMENTS_AT_ONCE]
        for run in every_page(partial(client.search_runs, part, f"tags.`{KEY}` = '{key}'", ViewType.ALL)):
            experiment = experiments[run.info.experiment_id]
            if run.info.lifecycle_stage == experiment.lifecycle_stage:
                found.add(experiment.experiment_id)
    return [experiments[i] for i in sorted(found)]


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turn what MLflow raises into one line."""
    try:
        yield
    except RequestError:
        raise
    except MlflowException as error:
        reason = _other_schema(error.message, uri) or error.message.splitlines()[0]
        raise RequestError(f"tracking.uri = {uri!r}: {reason}") from error
    except (SQLAlchemyError, ValueError) as error:
        raise RequestError(f"tracking.uri = {uri!r}: is not a store of MLflow's ({one_line(error)[:200]})") from error


def _other_schema(message: str, uri: str) -> str:
    """What to do with a database that another version of MLflow has made, where MLflow's error says so."""
    found = re.search(r"found version (\w+), but expected", message)
    if found is None:
        return ""
    migrations = Path(mlflow.__file__).parent / "store/db_migrations/versions"
    if not list(migrations.glob(f"{found[1]}_*.py")):
        return f"was made by a later MLflow than {mlflow.__version__}, which is installed here: install that one"
    upgrade = shlex.join(["mlflow", "db", "upgrade", uri])
    return f"was made by an earlier MLflow; after a backup, bring it up to date: {upgrade}"


@contextlib.contextmanager
def _made_once(database: Path | None) -> Iterator[None]:
    """One process at a time makes a SQLite store's tables; MLflow does not see to that."""
    if database is None:
        yield
        return
    try:
        with FileLock(_lock(database), timeout=PATIENCE):
            # where SQLite cannot open it, MLflow would try for minutes
            with contextlib.closing(sqlite3.connect(database)) as connection:
                connection.execute("PRAGMA schema_version")
            yield
    except sqlite3.Error as error:
        raise RequestError(f"{database}: is not a database that can be written to ({error})") from error
    except Timeout:
        raise RequestError(f"{database}: another process holds {_lock(database)}") from None
    except OSError as error:
        raise RequestError(f"{database}: cannot be written to ({error})") from error


def _refuse_foreign(database: Path, uri: str) -> None:
    """Raise RequestError where a file is no SQLite database: nothing is made beside it."""
    with contextlib.suppress(OSError), database.open("rb") as file:  # what cannot be opened, SQLite tells
        head = file.read(len(HEADER))
        if head and head != HEADER:
            raise RequestError(f"tracking.uri = {uri!r}: is not a store of MLflow's (the file is no SQLite database)")


def _has_tables(database: Path) -> bool:
    """Whether a SQLite file is a finished store. To open one that is not would make the tables."""
    if not database.exists():
        return False
    if _lock(database).exists():  # another process may be making them
        with contextlib.suppress(OSError, Timeout), FileLock(_lock(database), timeout=PATIENCE):
            pass
    if not database.stat().st_size:
        return False
    with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
        try:
            names = connection.execute("SELECT name FROM sqlite_master WHERE name = 'experiments'").fetchall()
        except sqlite3.DatabaseError as error:
            raise ValueError(str(error)) from error  # not a database
    return bool(names)


def _lock(database: Path) -> Path:
    return database.with_name(f".{database.name}.lock")
