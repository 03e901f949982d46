"""The folder of a run or a sweep: absolute, writable, and one driver's at a time."""

import getpass
import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout

from gsa import paths
from gsa.background import every
from gsa.config import TrainConfig
from gsa.errors import ConfigError, InfrastructureError, RequestError
from gsa.store import absolute_uri

logger = logging.getLogger(__name__)


class NotSharedError(InfrastructureError):
    """A node does not see the storage folder: no trial can run there."""


PROBE = 1 << 16  # bytes that a folder must take to count as writable
STALE = 60.0  # seconds after which an owner on another machine that gave no sign of life is held to be dead


def settle(config: TrainConfig, key: str = "storage") -> None:
    """Make paths absolute, as workers stand in other folders, and see that storage can be written to.

    Raises:
        ConfigError: it cannot, or something is no path.
    """
    above = key.removesuffix("storage")
    config.storage = paths.absolute(config.storage, key)
    corpus = config.data.corpus
    corpus.files = [paths.absolute(file, f"{above}data.corpus.files") for file in corpus.files]
    if corpus.name is not None and corpus.source == "hub" and paths.names_folder(corpus.name):
        corpus.name = paths.absolute(corpus.name, f"{above}data.corpus.name")
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


class Hold:
    """A folder that this process holds, and its note there for other machines.

    Args:
        folder: that is held.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.note = folder, folder / ".owner.json"
        self.owner = {"host": socket.gethostname(), "pid": os.getpid(), "user": getpass.getuser(), "id": uuid4().hex}
        self.lost = ""  # why this process no longer holds the folder; a driver looks here, and stops
        self._renewed, self._warned = time.monotonic(), False

    def take(self) -> None:
        """Write the note."""
        unfinished = self.note.with_name(".owner.new")
        unfinished.write_text(json.dumps(self.owner), encoding="utf-8")
        unfinished.replace(self.note)  # whole at any moment, and whoever owned the last one

    def renew(self) -> None:
        """Give a sign of life, unless another process has taken the folder over.

        Raises:
            OSError: the note cannot be read or renewed.
        """
        if self.lost:
            return
        try:
            other = _owner(self.note)
            if other == self.owner:
                os.utime(self.note)
            elif other is None:
                self.take()  # somebody deleted it
            else:
                self.lost = f"{self.folder} was taken over by {_words(other)}, as this one gave no sign of life"
                logger.error("%s", self.lost)
        except OSError:
            silent = time.monotonic() - self._renewed
            if silent > STALE / 2 and not self._warned:
                self._warned = True
                logger.error("%s: no sign of life for %.0f s; others may take it over", self.folder, silent)
            raise
        self._renewed, self._warned = time.monotonic(), False

    def release(self) -> None:
        """Delete the note, if it is still this process's."""
        if _owner(self.note) == self.owner:
            self.note.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, what: str) -> Iterator[Hold]:
    """Hold a folder for this process.

    On one machine the kernel lets go of the lock when its process dies. Other machines may share the folder and not the
    lock: for them its owner stands in a file, renewed as long as it lives, and is held to be dead `STALE` seconds after
    that ends. An owner that could not renew it for so long may be taken over: its `Hold` says so.

    Raises:
        RequestError: another process holds it (its name and its machine are named), or the folder cannot be written to.
    """
    hold = Hold(folder)
    lock = FileLock(folder / ".lock", timeout=0, mode=0o666)  # for all who may write to the folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        owner = _words(_owner(hold.note))
        raise RequestError(f"{what} is running already ({owner}; it holds {folder / '.lock'})") from None
    except OSError as error:
        raise RequestError(f"{what}: {folder} cannot be written to ({error.strerror})") from error
    try:
        other = _owner(hold.note)
        if other is not None and other["host"] != hold.owner["host"] and _age(hold.note) < STALE:
            raise RequestError(f"{what} is running already ({_words(other)}; if it is not, delete {hold.note})")
        hold.take()
        try:
            with every(STALE / 6, hold.renew, f"renewing the lock of {folder}"):
                yield hold
        finally:
            hold.release()
    finally:
        lock.release()


def _age(note: Path) -> float:
    """Seconds since a note was renewed, by the clock of whoever keeps the files: machines' clocks differ."""
    with tempfile.TemporaryFile(dir=note.parent) as probe:
        return os.fstat(probe.fileno()).st_mtime - note.stat().st_mtime


def _owner(note: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and {"host", "pid", "user"} <= found.keys() else None


def _words(owner: dict[str, Any] | None) -> str:
    return f"process {owner['pid']} of {owner['user']} on {owner['host']}" if owner else "by whom is not known"
