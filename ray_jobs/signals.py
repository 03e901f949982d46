"""Ctrl-C (SIGINT) and the stop of a Ray job (SIGTERM), which goes to each of its processes."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], None] | signal.Handlers


@contextmanager
def stops_go_to(handler: Handler) -> Iterator[None]:
    """Both are handled so while the block runs; to be called in the main thread."""
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)
