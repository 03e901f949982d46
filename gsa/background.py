"""Threads: what is done every now and then beside a block of code, and what is done apart."""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from gsa.errors import one_line

logger = logging.getLogger(__name__)


@contextmanager
def every(seconds: float, call: Callable[[], None], what: str) -> Iterator[None]:
    """Call from a thread of its own, each time after so many seconds, until the block ends.

    A call that raises does not end the thread: the error is logged, once for each type, and the next turn tries again.

    Args:
        seconds: between the end of one call and the next.
        call: what to do.
        what: names it in the log, for example "renewing the lock of runs/train/tiny".
    """
    done = threading.Event()
    logged: set[type[Exception]] = set()

    def repeat() -> None:
        while not done.wait(seconds):
            try:
                call()
            except Exception as error:  # noqa: BLE001 - the thread's outermost boundary: nobody else would hear of it
                if type(error) not in logged:
                    logged.add(type(error))
                    name = type(error).__name__
                    logger.error("%s failed, and is tried again (%s: %s)", what, name, one_line(error))

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def apart(call: Callable[[], object]) -> Future[None]:
    """Call in a thread that nobody waits for at exit; its end, and what it raised."""
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - whoever asks for the outcome gets it
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    threading.Thread(target=run, daemon=True).start()
    return outcome
