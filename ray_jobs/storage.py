"""The folder of a run or a sweep: absolute, writable, and one driver's at a time."""

import getpass
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gsa.background import every
from gsa.config import TrainConfig
from gsa.errors import ConfigError, InfrastructureError, RequestError
from gsa.store import absolute_uri


class NotSharedError(InfrastructureError):
    """A node does not see the storage folder: no trial can run there."""


PROBE = 1 << 16  # bytes that a folder must take to count as writable
STALE = 60.0  # seconds after which an owner on another machine that gave no sign of life is held to be dead


def settle(config: TrainConfig, key: str = "storage") -> None:
    """Make paths absolute, as workers stand in other folders, and see that storage can be written to.

    Raises:
        ConfigError: it cannot.
    """
    config.storage = os.path.abspath(config.storage)
    config.data.corpus.files = [os.path.abspath(file) for file in config.data.corpus.files]
    if config.tracking.uri is not None:
        config.tracking.uri = absolute_uri(config.tracking.uri)
    try:
        Path(config.storage).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=config.storage):
            pass
    except OSError as error:
        raise ConfigError(key, config.storage, f"cannot be written to ({error.strerror})") from error


def refuse_unwritable(folder: Path) -> None:
    """Raises InfrastructureError where a folder takes no more files: its disk is full, read-only or away."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * PROBE)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise InfrastructureError(f"{folder} cannot be written to ({error.strerror})") from error


def refuse_unshared(seen: Path) -> None:
    """Raises NotSharedError where this node does not see a file that the driver has written."""
    if not seen.is_file():
        where = f"{socket.gethostname()} does not see {seen}"
        raise NotSharedError(f"storage must be a folder that all nodes share: {where}")


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder for this process.

    On one machine the kernel lets go of the lock when its process dies. Other machines may share the folder and not the
    lock: for them its owner stands in a file, renewed as long as it lives, and is held to be dead `STALE` seconds after
    that ends.

    Raises:
        RequestError: another process holds it; it names the process and its machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / ".owner.json"
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "user": getpass.getuser()}
    try:
        with FileLock(folder / ".lock", timeout=0):
            other = _owner(note)
            if other is not None and other["host"] != owner["host"] and time.time() - note.stat().st_mtime < STALE:
                raise RequestError(f"{what} is running already ({_words(other)}; if it is not, delete {note})")
            note.write_text(json.dumps(owner), encoding="utf-8")
            with every(STALE / 6, note.touch):
                yield
            note.unlink(missing_ok=True)
    except Timeout:
        raise RequestError(f"{what} is running already ({_words(_owner(note))}; it holds {folder / '.lock'})") from None


def _owner(note: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and {"host", "pid", "user"} <= found.keys() else None


def _words(owner: dict[str, Any] | None) -> str:
    return f"process {owner['pid']} of {owner['user']} on {owner['host']}" if owner else "by whom is not known"
