"""What MLflow is to hold of a sweep's runs, brought up to date from the sweep's record and the spools.

- Nothing is lost: what to log is found out from the record and the spools alone, from their beginning.
- Nothing is doubled: runs are found again by their key, a row that the store holds has the same time there, and a run
  whose state is logged is done.
- A run that was deleted in MLflow is restored by whoever continues the sweep.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Protocol

from mlflow.entities import LifecycleStage, Run, ViewType
from mlflow.exceptions import MlflowException

from gsa import spool
from gsa.errors import RequestError, RunError, one_line
from gsa.tracking import KEY, TOLD, ArtifactError, Tracking, is_deleted
from gsa.training.steps import steps
from ray_jobs.record import COMPLETE, FAIL, PAUSED, PRUNED, RUNNING, Entry, apply, follow
from ray_jobs.runs import RunInfo

logger = logging.getLogger(__name__)

STATES = {COMPLETE: "finished", PRUNED: "stopped_early", FAIL: "failed", PAUSED: "stopped_early", RUNNING: "killed"}
ENDED = (COMPLETE, PRUNED, FAIL)
# what would be refused again: retrying is for everything else
LASTING = ("INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "NOT_FOUND")
LASTING_STATUS = range(400, 500)  # of HTTP: the same again will be refused again, but for these
PASSING_STATUS = (408, 425, 429)


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
        restore: whether a run that no sweep started was logged from here before: where it was deleted in MLflow, it is
            restored. A sweep's trials are always.
    """

    def __init__(self, tracking: Tracking, path: Path, context: Context, restore: bool = False) -> None:
        self.tracking, self.context, self.restore = tracking, context, restore
        self.refused: dict[str, str] = {}  # run to why MLflow does not take it
        self._entries: dict[str, Entry] = {}
        self._open: dict[str, Outlet] = {}
        self._runs: dict[str, Run] | None = None  # by key, that other lives of the sweep made
        self._events = follow(path)
        self._read(earlier=True)

    def advance(self, last: bool = False) -> bool:
        """Log what there is to log, each run in as few requests as it takes; whether there was anything.

        Args:
            last: nobody runs any more: a run without an end is logged as interrupted.

        Raises:
            MlflowException, requests.RequestException, OSError, SQLAlchemyError: MLflow does not answer; nothing is
                lost, call again.
            ArtifactError: a checkpoint could not be stored; all other runs are up to date. Call again.
        """
        did = self._read()
        failed: ArtifactError | None = None
        for trial_id, outlet in list(self._open.items()):
            try:
                did |= self._tell(outlet, last)
            except ArtifactError as error:
                if not _is_lasting(error):
                    failed = error
                    continue
                self._refuse(trial_id, str(error))
                continue
            except RunError as error:  # its spool is damaged
                self._refuse(trial_id, str(error))
                continue
            except MlflowException as error:
                if error.error_code not in LASTING:
                    raise
                self._refuse(trial_id, self._reason(outlet, error))
                continue
            if outlet.entry.state in ENDED and outlet.told == STATES[outlet.entry.state]:
                del self._open[trial_id]
        if failed is not None:
            raise failed
        return did

    def _refuse(self, trial_id: str, reason: str) -> None:
        """Give a run up for this life."""
        outlet = self._open.pop(trial_id)
        self.refused[outlet.info.key] = reason
        logger.error("%s: MLflow refuses it: %s", outlet.info.key, reason)

    def _reason(self, outlet: Outlet, error: MlflowException) -> str:
        """Why MLflow refuses a run, in words that say more than MLflow's where somebody deleted it."""
        experiment = self.tracking.client.get_experiment(self.tracking.experiment_id)
        if experiment.lifecycle_stage == LifecycleStage.DELETED:
            return f"the experiment {experiment.name!r} was deleted"
        try:
            if outlet.run_id and is_deleted(self.tracking.client.get_run(outlet.run_id)):
                return "its run was deleted"
        except MlflowException as gone:
            if gone.error_code not in LASTING:
                raise
        return one_line(error.message)[:500]

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
            try:
                self.tracking.describe(outlet.run_id, description["params"], description["config"])
            except RequestError as error:  # of what it measures, nothing is lost for that
                self.refused[outlet.info.key] = str(error)
                logger.error("%s", error)
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
                try:
                    self.tracking.upload(outlet.run_id, found[-1], "checkpoint")
                except ArtifactError:
                    self.tracking.log_rows(outlet.run_id, rows)  # they need not wait for it
                    outlet.offset = offset
                    raise
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
        if is_deleted(run):
            self.tracking.client.restore_run(run.info.run_id)
            logger.warning("%s: its run had been deleted in MLflow: restored", info.key)
        outlet.run_id = str(run.info.run_id)
        told = self.tracking.state(run)
        if told != "running":
            # in another life, and before its state these of its rows were told; since then it may have gone on
            outlet.told, outlet.offset = told, int(run.data.tags.get(TOLD, 0))
            outlet.described = outlet.offset > 0

    def _find(self, outlet: Outlet) -> Run | None:
        info = outlet.info
        if outlet.tried or (outlet.earlier and info.parent is None):
            return self.tracking.find_run(info.key, deleted=self.restore)
        if not outlet.earlier:
            return None
        if self._runs is None:
            found = self.tracking.children(str(info.parent), ViewType.ALL)
            found.sort(key=is_deleted, reverse=True)  # of two with one key, the one that was not deleted is taken
            self._runs = {run.data.tags[KEY]: run for run in found if KEY in run.data.tags}
        return self._runs.get(info.key)


def _is_lasting(error: ArtifactError) -> bool:
    """Whether an object store refused a file for good, by the status in what its client raised."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore's
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            status = getattr(response, "status_code", None)
        if status is not None:
            return status in LASTING_STATUS and status not in PASSING_STATUS
        cause = cause.__cause__ or cause.__context__
    return False
