"""How a driver asks the runs that train for it to save and stop: a file on the storage that all of them see."""

import time
from collections.abc import Callable
from pathlib import Path

ASKED = "stop"
INTERVAL = 0.5  # seconds between two looks at the file


def reset(path: Path) -> None:
    """Ask for nothing: what an earlier driver asked for is over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("", encoding="utf-8")


def request(path: Path) -> None:
    """Ask every run that watches this file to save and stop after the step in hand."""
    path.write_text(ASKED, encoding="utf-8")


def watch(path: Path) -> Callable[[], bool]:
    """A function that tells whether a stop was requested.

    It opens the file rather than look for it: over NFS only opening asks the server for what is new.
    """
    looked, stopped = 0.0, False

    def requested() -> bool:
        nonlocal looked, stopped
        if not stopped and time.monotonic() - looked >= INTERVAL:
            looked = time.monotonic()
            try:
                stopped = path.read_text(encoding="utf-8") == ASKED
            except OSError:  # no driver has reset it, or the storage is away for a moment: the next look tells
                stopped = False
        return stopped

    return requested
