"""A storage folder that was moved: the paths in its MLflow store follow.

MLflow keeps the place of every run's artifacts as an absolute path. In a storage folder the artifacts stand beside the
database, so that after `mv runs elsewhere` all of them are there, and MLflow looks for them, and writes new ones, where
the folder was before.
"""

import contextlib
import logging
import os
import sqlite3
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from gsa.errors import one_line

logger = logging.getLogger(__name__)

ARTIFACTS = "artifacts"  # folder of artifacts beside the database
# MLflow's columns that hold places of artifacts; a store that is not migrated yet may lack some
COLUMNS = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "model_versions": ("source", "storage_location"),
    "logged_models": ("artifact_location",),
    "trace_tags": ("value",),
}


def relocate(database: Path, patience: float = 60.0) -> None:
    """Let the paths of artifacts in a storage folder's store follow the folder, where it was moved or copied.

    To be called before MLflow opens the store. One transaction: several processes may do so at once. Experiments whose
    artifacts somebody keeps elsewhere stay as they are.

    Args:
        database: SQLite file of the store, in the storage folder; it may not be there, or not be MLflow's.
        patience: seconds to wait for another process that writes to it.
    """
    artifacts = database.parent.resolve() / ARTIFACTS
    if not database.is_file():
        return
    try:
        with _opened(database, patience) as connection:
            if not _moved(connection, artifacts):
                return
            connection.execute("BEGIN IMMEDIATE")
            for old in _moved(connection, artifacts):  # asked again: another process may have done it
                _rewrite(connection, old, artifacts)
                logger.warning(
                    "%s was moved: its artifacts are in %s now, and no longer in %s", database, artifacts, old
                )
            connection.execute("COMMIT")
    except sqlite3.OperationalError as error:
        # a copy that may only be read, for example: whoever needs no artifacts can work with it
        logger.warning("%s: whether it was moved cannot be seen or noted (%s)", database, one_line(error))


@contextlib.contextmanager
def _opened(database: Path, patience: float) -> Iterator[sqlite3.Connection]:
    uri = f"file:{urllib.parse.quote(str(database))}?mode=rw"
    connection = sqlite3.connect(uri, uri=True, timeout=patience, isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()


def _moved(connection: sqlite3.Connection, artifacts: Path) -> list[Path]:
    """The folders in which a store believes its artifacts to be, and which now are `artifacts`."""
    try:
        rows = connection.execute("SELECT experiment_id, artifact_location FROM experiments").fetchall()
    except sqlite3.DatabaseError:  # no store of MLflow's, or one without tables: MLflow itself says so
        return []
    found = []
    for experiment, location in rows:
        old = _path(location)
        if old is None or old.name != ARTIFACTS or old == artifacts or old in found:
            continue
        if old.exists() and os.path.samefile(old, artifacts):  # the same folder by another path
            continue
        query = "SELECT run_uuid FROM runs WHERE experiment_id = ?"
        runs = [row[0] for row in connection.execute(query, (experiment,))]
        if not old.exists() or any((artifacts / run).is_dir() for run in runs):
            found.append(old)
    return found


def _rewrite(connection: sqlite3.Connection, old: Path, new: Path) -> None:
    """Replace one folder by another at the beginning of every place of artifacts."""
    for before, after in ((old.as_uri(), new.as_uri()), (str(old), str(new))):
        for table, columns in COLUMNS.items():
            there = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
            for column in there.intersection(columns):
                # `||` binds before `=`; whole names of folders only: /runs-2 is not below /runs
                connection.execute(
                    f"UPDATE {table} SET {column} = :after || substr({column}, :length + 1)"  # noqa: S608 - our names
                    f" WHERE substr({column} || '/', 1, :length + 1) = :before || '/'",
                    {"before": before, "after": after, "length": len(before)},
                )


def _path(location: str | None) -> Path | None:
    """The folder that a location of artifacts names, if it is one of a file system."""
    if location is None:
        return None
    if location.startswith("file:"):
        return Path(urllib.parse.unquote(urllib.parse.urlsplit(location).path))
    return Path(location) if location.startswith("/") else None
