"""Signals that end a command.

SIGINT is Ctrl-C; SIGTERM comes from Slurm, Kubernetes, spot notices, `timeout` and the stop of a Ray job; SIGHUP from a
terminal that was closed.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

Handler = Callable[[int, FrameType | None], None] | signal.Handlers

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Saved(KeyboardInterrupt):
    """Interrupted in order: every run that trained has saved its last step."""


@contextmanager
def stops_go_to(handler: Handler) -> Iterator[None]:
    """Handle these signals so while the block runs; to be called in the main thread.

    `nohup` has SIGHUP ignored, and it stays so. SIGINT is handled even where a shell began this in the background.
    """
    taken = [s for s in STOPS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in taken}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


@contextmanager
def stops_held() -> Iterator[None]:
    """Hold these signals back while the block runs, for processes that it starts as long as they live.

    A signal to the whole process group, or to every process of a Slurm step, then reaches this process alone.
    """
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """A handler that ends what runs."""
    raise KeyboardInterrupt
