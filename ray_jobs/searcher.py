"""The Ray Tune searcher of a sweep: what runs next.

Trials that were cut off go on first, then paused ones that may go to the next rung (`ray_jobs.halving`), then new
proposals (`ray_jobs.studies`), and when the search is over the best are trained again with other seeds. Everything is
decided from the sweep's record, which is the only memory.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from gsa.config import TrainConfig
from gsa.errors import InfrastructureError, RequestError, RunError
from ray_jobs.halving import Halving
from ray_jobs.record import COMPLETE, FAIL, PRUNED, RUNNING, Entry, Record
from ray_jobs.studies import Studies

GRACE = 60.0  # seconds that trials have to save and stop when the sweep ends early
REJECTIONS = 200  # invalid proposals in a row after which the space is held to be empty

Gate = Callable[[TrainConfig], None]  # raises RequestError


class GsaSearcher(Searcher):
    """Proposes trials to Tune.

    Args:
        studies: what draws new proposals.
        halving: the rungs.
        record: of the sweep; takes proposals, results and ends.
        num_samples: proposals that run in the whole sweep, earlier lives included.
        max_failures: times a trial whose process died is proposed again, to go on from its checkpoint. (Tune's own
            option starts no trial again that died while it was starting.)
        gate: what a proposal must pass before it runs.
        confirmations: the trials that are to repeat the best once the search is over.
        spent: why nothing more may be started, or nothing.
        stop_trials: asks the trials that run to save and stop; called once, when the sweep ends early.
        grace: seconds that they have to do so.
        check_storage: raises InfrastructureError where the storage is at fault for a process that died.
    """

    def __init__(
        self,
        studies: Studies,
        halving: Halving,
        record: Record,
        num_samples: int,
        max_failures: int = 0,
        gate: Gate = lambda config: None,
        confirmations: Callable[[], list[Entry]] = list,
        spent: Callable[[], str] = lambda: "",
        stop_trials: Callable[[], None] = lambda: None,
        grace: float = GRACE,
        check_storage: Callable[[], None] = lambda: None,
    ) -> None:
        first = halving.aims.objectives[0]
        super().__init__(metric=first.metric, mode=first.mode)
        self.studies, self.halving, self.record, self.aims = studies, halving, record, halving.aims
        self.num_samples, self.max_failures = num_samples, max_failures
        self.gate, self.confirmations, self.spent = gate, confirmations, spent
        self.stop_trials, self.grace, self.check_storage = stop_trials, grace, check_storage
        self.interrupted = False  # by a signal
        self.broken = ""  # what failed that no trial is to blame for
        self.overdue = False  # some trial did not save in time
        self._halted_at: float | None = None  # trials that end from then on stay unfinished in the record
        self._lost_nodes: set[str] = set()  # Tune's ids of trials that died with their node
        self._waiting = [entry for entry in record.trials() if entry.state == RUNNING]
        self._ids: dict[str, str] = {}  # Tune's id of a trial to ours
        self._running: set[str] = set()  # ours
        self._failures: Counter[str] = Counter()
        self._started = sum(entry.searched and entry.ran for entry in record.entries.values())

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True  # the aims are known from the start

    @property
    def finished(self) -> bool:
        """Whether nothing is left to run."""
        return not self._running and self._next(peek=True) is None

    def halts(self) -> bool:
        """Whether the sweep ends early: nothing more starts, and trials that run are asked to save and stop."""
        if self._halted_at is None and (self.interrupted or self.broken or self.spent()):
            self._halted_at = time.monotonic()
            try:
                self.stop_trials()
            except OSError as error:  # they cannot save there either
                self.broken = self.broken or f"running trials could not be asked to stop ({error})"
        return self._halted_at is not None

    def cuts_off(self) -> bool:
        """Whether the experiment ends now: it ends early, and its trials have stopped or have had their time to."""
        if not self.halts() or self._halted_at is None:
            return False
        self.overdue = self.overdue or (bool(self._running) and time.monotonic() - self._halted_at > self.grace)
        return self.overdue or not self._running

    def lost_node(self, trial_id: str) -> None:
        """The node of a trial has died: when Tune says that the trial has failed, it is not the trial's fault."""
        self._lost_nodes.add(trial_id)

    def suggest(self, trial_id: str) -> Any:
        """The next trial to run; invalid proposals are told to Optuna as failed, at no cost.

        Raises:
            RunError: nothing valid was found in many draws.
        """
        entry = None if self.halts() else self._next()
        if entry is None:
            return None if self._running else Searcher.FINISHED  # one that runs may have to run again, or make room
        self._ids[trial_id] = entry.trial_id
        self._running.add(entry.trial_id)
        return entry.proposal()

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        measured = self.aims.measured(result)
        if measured and "step" in result:
            self.record.result(self._ids[trial_id], int(result["step"]), measured, float(result.get("seconds", 0)))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        own = self._ids.pop(trial_id)
        self._running.discard(own)
        entry = self.record.entries[own]
        result = result or {}
        self.broken = self.broken or str(result.get("infrastructure", ""))
        came_to_its_end = bool(result.get("complete") or result.get("paused"))
        if (self.halts() and not came_to_its_end) or entry.state != RUNNING:
            return
        if error:
            self._died(own, trial_id in self._lost_nodes)
            return
        if result.get("failed"):
            self.record.end(own, FAIL, reason=str(result["failed"]))
            return
        self._ids[trial_id] = own
        self.on_trial_result(trial_id, result)  # Tune tells the last one only here
        del self._ids[trial_id]
        measured = self.aims.measured(result)
        values = self.aims.values(measured)
        if values is None:
            shown = ", ".join(f"{o.metric} = {measured.get(o.metric, 'missing')}" for o in self.aims.objectives)
            self.record.end(own, FAIL, reason=f"an objective is not finite: {shown}")
        elif result.get("complete"):
            self.record.end(own, COMPLETE, values)
        elif result.get("paused"):
            self.record.pause(own)
        else:
            self.record.end(own, PRUNED)

    def _died(self, own: str, with_its_node: bool) -> None:
        """The process of a trial has died."""
        try:
            self.check_storage()
        except InfrastructureError as fault:
            self.broken = str(fault)
            return
        self._failures[own] += not with_its_node
        if self._failures[own] <= self.max_failures:
            self._waiting.append(self.record.entries[own])
        else:
            self.record.end(own, FAIL, reason=f"its process died {self._failures[own]} times")

    def save(self, checkpoint_path: str) -> None:
        """The record is on disk already."""

    def restore(self, checkpoint_path: str) -> None:
        raise RunError("a sweep is continued from its record, not from Tune's own state")

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles whatever refers to it into a state that nobody restores

    def _next(self, peek: bool = False) -> Entry | None:
        """The trial that is to run next, as it then stands in the record; None: none now.

        Args:
            peek: change nothing; some entry, if there is something to run.
        """
        if self._waiting:
            return self._waiting[0] if peek else self._waiting.pop(0)
        if self.halts():
            return None
        entries = self.record.entries
        paused = self.halving.promotable(entries)
        if paused is None and self._started < self.num_samples:
            return Entry("", {}, {}) if peek else self._propose()
        if paused is None and not self._running:
            paused = self.halving.promotable(entries, closing=True)
        if paused is not None:
            if not peek:
                self.record.promote(paused.trial_id, self.halving.after(paused.until))
            return paused
        if not self._running_searched():
            for entry in self.confirmations():
                if entry.trial_id not in entries:
                    if not peek:
                        self.record.propose(entry)
                    return entries.get(entry.trial_id, entry)
        return None

    def _running_searched(self) -> bool:
        return any(self.record.entries[own].searched for own in self._running)

    def _propose(self) -> Entry:
        for _ in range(REJECTIONS):
            entry = self.studies.draw()
            entry.until = self.halving.first
            try:
                self.gate(self.studies.space.compose(entry.settings))
            except RequestError as error:
                entry.state, entry.reason, entry.ran = FAIL, str(error), False
                self.record.propose(entry)
                continue
            self._started += 1
            self.record.propose(entry)
            return self.record.entries[entry.trial_id]
        raise RunError(f"the space has no valid combination in {REJECTIONS} draws; the last: {entry.reason}")
