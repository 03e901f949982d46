"""Threads: what is done every now and then beside a block of code, and what is done apart."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager


@contextmanager
def every(seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """Call from a thread of its own, each time after so many seconds, until the block ends."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(seconds):
            call()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def apart(call: Callable[[], None]) -> Future[None]:
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
