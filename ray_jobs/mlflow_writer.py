"""The process that logs a sweep's runs to MLflow, beside the sweep.

- The sweep never waits for MLflow: while it does not answer, everything stays on disk, and is logged when it does.
- If the process dies, another takes its place; what to log is found out from the record and the spools
  (`ray_jobs.mlflow_log`), so nothing is lost and nothing is doubled.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path

import requests
from filelock import FileLock
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from gsa.background import every
from gsa.errors import one_line
from gsa.tracking import ArtifactError, Tracking, remember
from gsa.tracking.connection import MEMORY
from ray_jobs.mlflow_log import Context, MlflowLog

logger = logging.getLogger(__name__)

PAUSES = (0.5, 1.0, 2.0, 5.0, 10.0)  # seconds between tries while MLflow does not answer
INTERVAL = 1.0  # seconds between looks at the spools
WATCH = 1.0  # seconds between looks at the process
LONGEST_PAUSE = 60.0  # seconds until a process that keeps dying is started again
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REFUSED, DIED = 3, 4  # exit codes
FAILURES = (MlflowException, requests.RequestException, OSError, SQLAlchemyError, ArtifactError)  # that pass


class MlflowWriter:
    """`MlflowLog` in a process of its own, which is watched and started again if it dies.

    It outlives neither `finish` nor, but for what it is doing, this process. Two for one record wait for each other.

    Args:
        tracking: where to.
        path: of the record.
        context: what runs are called.
    """

    def __init__(self, tracking: Tracking, path: Path, context: Context) -> None:
        self.tracking, self.path, self.context = tracking, path, context
        self.uri = tracking.uri
        self._restore = (path.parent / MEMORY).exists()  # it was logged from here before
        self._processes = multiprocessing.get_context("spawn")
        self._watch = contextlib.ExitStack()
        self._reason = ""  # the last that the process said of what keeps it
        self._deaths, self._due = 0, 0.0

    def start(self) -> None:
        remember(self.tracking, self.path.parent)
        self._begin()
        self._watch.enter_context(every(WATCH, self._revive, "watching the process that logs to MLflow"))

    def finish(self, patience: float) -> str:
        """Let it log the rest; what it could not log within `patience` seconds, in words, or nothing.

        Nothing is lost then: whoever continues the sweep logs it.
        """
        self._watch.close()
        deadline = time.monotonic() + patience
        for _ in range(2):  # the second, where the first was killed meanwhile
            if not self._process.is_alive():
                self._begin()
            with contextlib.suppress(OSError):  # it has died: its exit code tells
                self._stop.send(True)
            self._process.join(max(0.0, deadline - time.monotonic()))
            self._hear()
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
                return f"{self.uri} did not take everything within {patience:.0f} s ({self._reason or 'it is slow'})"
            if self._process.exitcode in (0, REFUSED):
                break
        if self._process.exitcode == 0:
            return ""
        if self._process.exitcode == REFUSED:
            return f"{self.uri} refused a part: {self._reason}"
        code = f"exit code {self._process.exitcode}"
        return f"the process that logs to {self.uri} died ({self._reason or code})"

    def _begin(self) -> None:
        """Start the process; in any thread."""
        # not an `Event`: if its process is killed while it looks at that, setting it would wait for ever
        theirs, self._stop = self._processes.Pipe(duplex=False)
        self._heard, ours = self._processes.Pipe(duplex=False)
        arguments = (
            self.tracking.uri, self.tracking.experiment_id, self.path, self.context, self._restore, theirs, ours,
            os.getpid(),
        )  # fmt: skip
        resource_tracker.ensure_running()  # to start it would let the signals through
        # held back until it ignores them: the sweep says when to end
        earlier = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            process = self._processes.Process(target=_work, args=arguments, daemon=True, name="mlflow-writer")
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
            theirs.close()
            ours.close()
        self._process = process

    def _revive(self) -> None:
        """Start the process again where it has died."""
        self._hear()
        if self._process.is_alive() or time.monotonic() < self._due:
            return
        self._deaths += 1
        self._due = time.monotonic() + min(2.0**self._deaths, LONGEST_PAUSE)
        if self._deaths == 1:
            reason = self._reason or f"exit code {self._process.exitcode}"
            logger.warning("the process that logs to MLflow died (%s): started again; nothing is lost", reason)
        try:
            self._begin()
        except OSError as error:  # no memory, no file handles: the next look tries again
            self._reason = one_line(error)

    def _hear(self) -> None:
        """Take in what the process has said; once it has died, there is no more."""
        with contextlib.suppress(EOFError, OSError):
            while self._heard.poll():
                self._reason = str(self._heard.recv())


def _work(
    uri: str,
    experiment: str,
    path: Path,
    context: Context,
    restore: bool,
    stop: Connection,
    say: Connection,
    parent: int,
) -> None:
    for number in STOPS:  # a job's stop goes to each of its processes
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    os.setsid()  # what stops the sweep's process group is meant for the sweep, which says when to stop
    os.nice(10)  # trials and the sweep go before it
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("mlflow", "alembic", "sqlalchemy", "urllib3", "botocore", "boto3", "s3transfer"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what they log they also raise; one line of ours is enough
    try:
        with FileLock(path.with_name(".mlflow.lock")):
            log = MlflowLog(Tracking(uri, experiment), path, context, restore)
            for last in _until(stop):
                if last:
                    _advance(log, parent, False, stop, say)
                _advance(log, parent, last, stop, say)
    except Exception as error:
        # whatever it is, the sweep starts this again, and says it at the end if that does not help
        _say(say, f"{type(error).__name__}: {one_line(error)}"[:500])
        raise SystemExit(DIED) from error
    if log.refused:
        key, reason = next(iter(log.refused.items()))
        more = len(log.refused) - 1
        _say(say, f"{key}: {reason}" + (f" (and {more} more)" if more else ""))
        raise SystemExit(REFUSED)


def _until(stop: Connection) -> Iterator[bool]:
    """False every now and then, and once True when it is time to stop; nothing more once the parent is dead."""
    due = 0.0
    while not stop.poll(max(0.0, due - time.monotonic())):  # at once, where logging took longer than that
        due = time.monotonic() + INTERVAL
        yield False
    with contextlib.suppress(EOFError):  # the parent is dead, and has said nothing
        yield bool(stop.recv())


def _advance(log: MlflowLog, parent: int, last: bool, stop: Connection, say: Connection) -> None:
    """Advance until MLflow has answered, it is time to stop, or the parent is dead."""
    failures, kinds = 0, set()
    while True:
        try:
            log.advance(last)
        except FAILURES as error:
            reason = one_line(error)[:200]
            kind = type(error), getattr(error, "error_code", "")
            if kind not in kinds:
                kinds.add(kind)
                logger.warning("MLflow does not answer; results wait on disk and are logged later (%s)", reason)
                _say(say, reason)
            pause = PAUSES[min(failures, len(PAUSES) - 1)]
            failures += 1
            if last:
                time.sleep(pause)
            elif stop.poll(pause):
                return  # it is time to stop: the last time round tries it again
            if os.getppid() != parent:
                return
            continue
        if failures:
            logger.warning("MLflow answers again: what waited is logged")
            _say(say, "")
        return


def _say(say: Connection, text: str) -> None:
    with contextlib.suppress(OSError):  # the parent is dead
        say.send(text)
