"""The Ray Tune searcher of a sweep: what runs next.

Trials that were cut off go on first, then paused ones that may go to the next rung (`ray_jobs.halving`), then new
proposals (`ray_jobs.studies`), and when the search is over the best are trained again with other seeds. Everything is
decided from the sweep's record, which is the only memory.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from gsa.config import TrainConfig
from gsa.errors import RequestError, RunError
from ray_jobs.halving import Halving
from ray_jobs.record import COMPLETE, FAIL, PRUNED, RUNNING, Entry, Record
from ray_jobs.studies import Studies

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
    ) -> None:
        first = halving.aims.objectives[0]
        super().__init__(metric=first.metric, mode=first.mode)
        self.studies, self.halving, self.record, self.aims = studies, halving, record, halving.aims
        self.num_samples, self.max_failures = num_samples, max_failures
        self.gate, self.confirmations, self.spent = gate, confirmations, spent
        self.interrupted = False  # by a signal
        self.refused = ""  # why the sweep cannot go on
        self.stopped = False  # trials that end from now on were cut off, and stay unfinished in the record
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

    @property
    def halted(self) -> bool:
        """Whether trials that run are to be cut off: they stay unfinished in the record."""
        self.stopped = self.stopped or self.interrupted or bool(self.refused or self.spent())
        return self.stopped

    def suggest(self, trial_id: str) -> Any:
        """The next trial to run; invalid proposals are told to Optuna as failed, at no cost.

        Raises:
            RunError: nothing valid was found in many draws.
        """
        entry = self._next()
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
        self.refused = self.refused or str(result.get("not_shared", ""))
        came_to_its_end = bool(result.get("complete") or result.get("paused"))
        cut_off = (self.interrupted or self.stopped or self.refused) and not came_to_its_end
        if cut_off or entry.state != RUNNING:
            return
        if error:
            self._failures[own] += 1
            if self._failures[own] <= self.max_failures:
                self._waiting.append(entry)
            else:
                self.record.end(own, FAIL, reason=f"its process died {self._failures[own]} times")
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
        if self.halted:
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
