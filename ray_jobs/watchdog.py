"""Notices that the Ray cluster is gone: Ray itself waits for it for a minute, or for ever."""

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from functools import partial
from types import FrameType

import psutil
import ray
import ray._private.worker

from gsa.background import apart
from gsa.errors import InfrastructureError

INTERVAL = 1.0  # seconds between two looks
# seconds without an answer after which the head counts as gone; where it may come back, Ray's own setting says how long
# that may take
RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"
GCS_PATIENCE = float(os.environ.get(RECONNECT, 6))
SHUTDOWN = 2.0  # seconds that Ray has to let go of a cluster that is gone
TELLS = signal.SIGUSR2  # the main thread; Tune has its own use for SIGUSR1
LAST = 7.0  # seconds after which a process that Ray keeps from ending in order ends at once
WORDS = 3.0  # seconds that each of its last words may take


class _Gone(BaseException):
    """Raised in the main thread; nothing of Ray catches it."""


@contextmanager
def connected_cluster(again: str) -> Iterator[None]:
    """Run a block that needs the cluster that `ray.init` has joined, and leave it; to be called in the main thread.

    Args:
        again: the command that goes on afterwards, for a process that cannot end in order.

    Raises:
        InfrastructureError: the cluster is gone. The block was ended where it was.
    """
    global _current
    watch = _current = _Watch(again)
    earlier = signal.signal(TELLS, watch.raise_once)
    threading.Thread(target=watch.run, daemon=True, name="ray-watchdog").start()
    try:
        with cluster_faults():
            yield
    finally:
        _current = None
        watch.done.set()
        signal.signal(TELLS, earlier)
        _leave(watch.reason)


@contextmanager
def cluster_faults() -> Iterator[None]:
    """Say of whatever a block raises, once the cluster is gone, that it is.

    Raises:
        InfrastructureError: the cluster is gone.
    """
    try:
        yield
    except InfrastructureError:
        raise
    except BaseException as error:
        if _current is None or not _current.reason:
            raise
        # `_Gone`, or what Ray has made of it on the way
        raise InfrastructureError(_current.news) from error


@contextmanager
def at_the_last(say: Callable[[str], object]) -> Iterator[None]:
    """Have this called with the reason, from another thread, where a cluster that is gone takes the process with it
    while the block runs: no `finally` of the main thread is reached then."""
    if _current is None:
        yield
        return
    words = _current.words
    words.append(say)
    try:
        yield
    finally:
        words.remove(say)


def _leave(gone: str) -> None:
    """Let go of the cluster; of one that is gone, not for longer than `SHUTDOWN` seconds."""
    if not gone:
        with _ended_at_once():
            ray.shutdown()
        return
    atexit.unregister(ray._private.worker.shutdown)
    leaving = threading.Thread(target=ray.shutdown, daemon=True)
    leaving.start()
    leaving.join(SHUTDOWN)


@contextmanager
def _ended_at_once() -> Iterator[None]:
    """Have Ray end what this process has started by SIGKILL, and end what is left of it afterwards.

    Ray's processes hold SIGTERM back (`stops_held`): Ray would wait a second for each of five before it kills it.
    """
    node = ray._private.worker.global_worker.node
    started = [one.process for group in node.all_processes.values() for one in group] if node is not None else []
    family: list[psutil.Process] = []
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += psutil.Process(process.pid).children(recursive=True)
        process.terminate = process.kill
    yield
    for member in family:  # the agents of a raylet would look for the head for half a minute
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


_current: "_Watch | None" = None  # of the cluster that this process has joined


class _Watch:
    """Looks after a cluster from a thread of its own, and tells the main thread once it is gone."""

    def __init__(self, again: str) -> None:
        self.again = again
        self.reason = ""
        self.done = threading.Event()
        self.words: list[Callable[[str], object]] = []
        self._gcs = ray.get_runtime_context().gcs_address
        self._raylet = _own_raylet()
        self._raised = False

    @property
    def news(self) -> str:
        return f"the Ray cluster is gone: {self.reason}"

    def run(self) -> None:
        answered = time.monotonic()
        while not self.reason:
            if self.done.wait(INTERVAL):
                return
            if self._raylet is not None and not _lives(self._raylet):
                self.reason = f"its process on this machine (raylet, pid {self._raylet.pid}) has ended"
            elif self._gcs_answers():
                answered = time.monotonic()
            elif time.monotonic() - answered > GCS_PATIENCE:
                self.reason = f"its head does not answer at {self._gcs}"
        signal.pthread_kill(threading.main_thread().ident or 0, TELLS)
        if not self.done.wait(LAST):  # Ray has caught the exception, or waits where none can be raised
            advice = f"no trial is lost. To go on: {self.again}" if self.again else ""
            print(f"error: {self.news}\n{advice}", file=sys.stderr, flush=True)
            for say in self.words[::-1]:
                wait([apart(partial(say, self.news))], WORDS)
            os._exit(1)
        while threading.main_thread().is_alive():
            time.sleep(INTERVAL)
        time.sleep(SHUTDOWN)
        os._exit(1)  # the error was shown, and Ray's threads keep the process from ending

    def raise_once(self, number: int, frame: FrameType | None) -> None:
        if not self._raised:
            self._raised = True
            raise _Gone

    def _gcs_answers(self) -> bool:
        host, _, port = self._gcs.rpartition(":")
        with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout=INTERVAL):
            return True
        return False


def _own_raylet() -> psutil.Process | None:
    """The raylet of this machine that this process talks to, where it can be told."""
    node = ray._private.worker.global_worker.node
    if node is None:
        return None
    word = f"--raylet_socket_name={node.raylet_socket_name}"
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "raylet" and word in (process.info["cmdline"] or []):
            return process
    return None


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False
