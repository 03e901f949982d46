"""Progress through many bytes: a bar on a terminal, a line in the log every some seconds elsewhere."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

logger = logging.getLogger(__name__)

EVERY = 10.0  # seconds between lines


@contextmanager
def progress(what: str, total: int | None, console: Console | None = None) -> Iterator[Callable[[int], None]]:
    """Show how far a block of code has come, with its speed and the time that is left.

    Args:
        what: names what is done.
        total: bytes of all of it; None where that is not known.
        console: where a bar is shown if it is a terminal; the default is standard error.

    Yields:
        A function that takes how many more bytes are done.
    """
    console = console or Console(stderr=True)
    if not logger.isEnabledFor(logging.INFO):
        yield lambda _: None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
            task = bars.add_task(what, total=total)
            yield lambda count: bars.advance(task, count)
    else:
        yield _Lines(what, total).advance


class _Lines:
    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total, self.done = what, total, 0
        self.began = self.said = time.monotonic()

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.said < EVERY:
            return
        self.said = now
        speed = self.done / (now - self.began)
        of, left = "", ""
        if self.total is not None and self.done <= self.total:
            of = f" of {self.total / 1e6:.1f}"
            left = f", about {(self.total - self.done) / speed:.0f} s left" if speed else ""
        logger.info("%s: %.1f%s MB, %.1f MB/s%s", self.what, self.done / 1e6, of, speed / 1e6, left)
