"""The folder of a run or a sweep: absolute, writable, and one driver's at a time."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from gsa.config import TrainConfig
from gsa.errors import ConfigError, RequestError


def settle(config: TrainConfig, key: str = "storage") -> None:
    """Make paths absolute, as workers stand in other folders, and see that storage can be written to.

    Raises:
        ConfigError: it cannot.
    """
    config.storage = os.path.abspath(config.storage)
    config.data.corpus.files = [os.path.abspath(file) for file in config.data.corpus.files]
    try:
        Path(config.storage).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=config.storage):
            pass
    except OSError as error:
        raise ConfigError(key, config.storage, f"cannot be written to ({error.strerror})") from error


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder for this process; the kernel lets go of it when the process dies.

    Raises:
        RequestError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise RequestError(f"{what} is running already (it holds {folder / '.lock'})") from None
