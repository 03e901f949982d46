"""The one that tells MLflow what a sweep's runs have to say: a process that follows the sweep's record and the spools.

- The sweep never waits for MLflow: while it does not answer, everything stays on disk, and is told when it does.
- Nothing is lost: what to tell is found out from the record and the spools alone, from their beginning.
- Nothing is doubled: runs are found again by their key, a row that the store holds has the same time there, and a run
  whose state is told is done.
"""

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import requests
from filelock import FileLock
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from gsa import spool
from gsa.errors import one_line
from gsa.tracking import KEY, TOLD, Tracking
from gsa.training.steps import steps
from ray_jobs.record import COMPLETE, FAIL, PAUSED, PRUNED, RUNNING, Entry, apply, follow
from ray_jobs.runs import RunInfo
from ray_jobs.signals import stops_go_to

logger = logging.getLogger(__name__)

STATES = {COMPLETE: "finished", PRUNED: "stopped_early", FAIL: "failed", PAUSED: "stopped_early", RUNNING: "killed"}
ENDED = (COMPLETE, PRUNED, FAIL)
# what would be refused again: retrying is for everything else
LASTING = ("INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "NOT_FOUND")
PAUSES = (0.5, 1.0, 2.0, 5.0, 10.0)  # seconds between tries while MLflow does not answer
INTERVAL = 1.0  # seconds between looks at the spools


class Context(Protocol):
    """Who knows how runs are called (`ray_jobs.runs`)."""

    def run(self, entry: Entry) -> RunInfo: ...


@dataclasses.dataclass
class Outlet:
    """One run: what of it was told."""

    entry: Entry
    info: RunInfo
    earlier: bool  # from another life of the sweep
    tried: bool = False  # to make the run: it may be there though no answer came
    run_id: str = ""
    offset: int = 0  # into its spool
    described: bool = False
    told: str = ""  # the state that MLflow was told


class MlflowLog:
    """Brings MLflow up to date with a record and its spools.

    Args:
        tracking: where to.
        path: of the record.
        context: what runs are called.
    """

    def __init__(self, tracking: Tracking, path: Path, context: Context) -> None:
        self.tracking, self.context = tracking, context
        self.refused: dict[str, str] = {}  # run to why MLflow does not take it
        self._entries: dict[str, Entry] = {}
        self._open: dict[str, Outlet] = {}
        self._runs: dict[str, Run] | None = None  # by key, that other lives of the sweep made
        self._events = follow(path)
        self._read(earlier=True)

    def advance(self, last: bool = False) -> bool:
        """Tell what there is to tell, each run in as few requests as it takes; whether there was anything.

        Args:
            last: nobody runs any more: a run without an end is told as interrupted.

        Raises:
            MlflowException, requests.RequestException: MLflow does not answer; nothing is lost, call again.
        """
        did = self._read()
        for trial_id, outlet in list(self._open.items()):
            try:
                did |= self._tell(outlet, last)
            except MlflowException as error:
                if error.error_code not in LASTING:
                    raise
                self.refused[outlet.info.key] = error.message.splitlines()[0]
                logger.error("%s: MLflow refuses it: %s", outlet.info.key, self.refused[outlet.info.key])
                del self._open[trial_id]
                continue
            if outlet.entry.state in ENDED and outlet.told == STATES[outlet.entry.state]:
                del self._open[trial_id]
        return did

    def _read(self, earlier: bool = False) -> bool:
        """Take in new events, `earlier` ones of other lives as such."""
        read = False
        for event in self._events:
            if event is None:
                return read
            read = True
            entry = apply(self._entries, event)
            if entry is None or event["event"] != "propose" or not entry.ran or entry.imported is not None:
                continue
            if entry.trial_id in self._open:
                self._open[entry.trial_id].entry = entry  # a run that no sweep started goes on
            else:
                self._open[entry.trial_id] = Outlet(entry, self.context.run(entry), earlier)
        return read

    def _tell(self, outlet: Outlet, last: bool) -> bool:
        entry, before = outlet.entry, dataclasses.replace(outlet)
        state = STATES[entry.state] if last or entry.state != RUNNING else "running"
        if not outlet.run_id:
            self._start(outlet, state)
        if outlet.told != "running" and state == "running":
            self.tracking.restart(outlet.run_id)
            outlet.told = "running"
        description = None if outlet.described else spool.description(outlet.info.folder)
        if description is not None:
            self.tracking.describe(outlet.run_id, description["params"], description["config"])
            self.tracking.describe_data(outlet.run_id, description["corpus"], description["fingerprint"])
            outlet.described = True
        rows, offset = spool.read(outlet.info.folder, outlet.offset)
        while rows:
            following, end = spool.read(outlet.info.folder, offset)
            if not following and state != "running":
                break  # the last ones go with the state
            self.tracking.log_rows(outlet.run_id, rows)
            outlet.offset, rows, offset = offset, following, end
        if outlet.told != state or rows:
            if state == "finished" and (found := steps(outlet.info.folder)):
                self.tracking.upload(outlet.run_id, found[-1], "checkpoint")
            self.tracking.finish(outlet.run_id, state, entry.reason, offset, rows)
            outlet.told, outlet.offset = state, offset
        return outlet != before

    def _start(self, outlet: Outlet, state: str) -> None:
        """Find or make the run."""
        info = outlet.info
        run = self._find(outlet)
        if run is None:
            outlet.tried = True
            outlet.run_id = self.tracking.create_run(info.key, info.name, info.parent, info.tags)
            outlet.told = "running"
            return
        outlet.run_id = str(run.info.run_id)
        told = self.tracking.state(run)
        if told != "running":
            # in another life, and before its state these of its rows were told; since then it may have gone on
            outlet.told, outlet.offset = told, int(run.data.tags.get(TOLD, 0))
            outlet.described = outlet.offset > 0

    def _find(self, outlet: Outlet) -> Run | None:
        info = outlet.info
        if outlet.tried or (outlet.earlier and info.parent is None):
            return self.tracking.find_run(info.key)
        if not outlet.earlier:
            return None
        if self._runs is None:
            self._runs = {run.data.tags[KEY]: run for run in self.tracking.children(str(info.parent))}
        return self._runs.get(info.key)


class MlflowWriter:
    """`MlflowLog` in a process of its own, as long as the block runs.

    It outlives neither the block nor, but for what it is doing, this process. Two for one record wait for each other.
    """

    def __init__(self, tracking: Tracking, path: Path, context: Context) -> None:
        processes = multiprocessing.get_context("spawn")
        # not an `Event`: if its process is killed while it looks at that, setting it would wait for ever
        self._theirs, self._stop = processes.Pipe(duplex=False)
        self.uri = tracking.uri
        arguments = (tracking.uri, tracking.experiment_id, path, context, self._theirs, os.getpid())
        self._process = processes.Process(target=_work, args=arguments, daemon=True, name="mlflow-writer")

    def start(self) -> None:
        """Call it in the main thread."""
        # its child begins with that: the sweep says when to end
        with stops_go_to(signal.SIG_IGN):
            self._process.start()
        self._theirs.close()

    def finish(self, patience: float) -> str:
        """Let it tell the rest; what it could not tell within `patience` seconds, in words, or nothing.

        Nothing is lost then: whoever continues the sweep tells it.
        """
        with contextlib.suppress(OSError):  # it has died: its exit code tells
            self._stop.send(True)
        self._process.join(patience)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
            return f"{self.uri} did not answer for {patience:.0f} s"
        return "" if self._process.exitcode == 0 else f"{self.uri} refused a part (exit code {self._process.exitcode})"


def _work(uri: str, experiment: str, path: Path, context: Context, stop: Connection, parent: int) -> None:
    os.setsid()  # what stops the sweep's process group is meant for the sweep, which says when to stop
    os.nice(10)  # trials and the sweep go before it
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it tells of each try; one line of ours is enough
    with FileLock(path.with_name(".mlflow.lock")):
        log = MlflowLog(Tracking(uri, experiment), path, context)
        for last in _until(stop):
            if last:
                _advance(log, parent, last=False)
            _advance(log, parent, last)
    if log.refused:
        raise SystemExit(3)


def _until(stop: Connection) -> Iterator[bool]:
    """False every now and then, and once True when it is time to stop; nothing more once the parent is dead."""
    due = 0.0
    while not stop.poll(max(0.0, due - time.monotonic())):  # at once, where telling took longer than that
        due = time.monotonic() + INTERVAL
        yield False
    with contextlib.suppress(EOFError):  # the parent is dead, and has said nothing
        yield bool(stop.recv())


def _advance(log: MlflowLog, parent: int, last: bool) -> None:
    """Advance until MLflow has answered, or the parent is dead."""
    failures = 0
    while True:
        try:
            log.advance(last)
        except (MlflowException, requests.RequestException) as error:
            if not failures:
                reason = one_line(error)[:200]
                logger.warning("MLflow does not answer; results wait on disk and are logged later (%s)", reason)
            time.sleep(PAUSES[min(failures, len(PAUSES) - 1)])
            failures += 1
            if os.getppid() != parent:
                return
            continue
        if failures:
            logger.warning("MLflow answers again: what waited is logged")
        return
