"""Live progress: a table that redraws itself on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ray_jobs.events import Event
from ray_jobs.halving import Halving
from ray_jobs.objectives import ObjectiveConfig
from ray_jobs.record import COMPLETE, FAIL, PAUSED, PRUNED, RUNNING, Entry, Record

WORDS = {COMPLETE: "finished", PRUNED: "stopped early", FAIL: "failed", PAUSED: "paused", RUNNING: "running"}


class SweepProgress:
    """Follows a sweep's record.

    Args:
        record: of the sweep.
        objectives: of the sweep; the first decides which trial is best so far.
        total: trials of the whole sweep, baselines included.
        samples: of them, those that the searcher proposes.
        total_steps: optimizer steps of one trial.
        halving: the rungs, where trials pause.
        console: where to print.
        clock: seconds from any time on.
    """

    def __init__(
        self,
        record: Record,
        objectives: list[ObjectiveConfig],
        total: int,
        samples: int,
        total_steps: int,
        halving: Halving,
        console: Console,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.record, self.objectives, self.total, self.samples = record, objectives, total, samples
        self.total_steps, self.halving, self.console, self.clock = total_steps, halving, console, clock
        self.began, self.steps_before = clock(), self._steps_done()

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show progress while the block runs."""
        self.record.subscribe(self._observe)
        if not self.console.is_terminal:
            yield
            return
        with Live(get_renderable=self.render, console=self.console, refresh_per_second=2):
            yield

    def render(self) -> Table:
        table = Table(title=self.summary(), title_justify="left", pad_edge=False)
        names = [o.metric.removeprefix("held_out_") for o in self.objectives]
        for header in ("trial", "state", "step", *names):
            table.add_column(header, justify="left" if header in ("trial", "state") else "right")
        running = [e for e in self.record.trials() if e.state == RUNNING]
        for entry in running:
            step = max(entry.steps, default=0)
            values = entry.steps.get(step, {})
            shown = [f"{values[o.metric]:.4f}" if o.metric in values else "" for o in self.objectives]
            table.add_row(entry.trial_id, WORDS[entry.state], f"{step}/{self.total_steps}", *shown)
        return table

    def summary(self) -> str:
        """Trials by state, the best so far and the time that is left, in one line."""
        states = Counter(PRUNED if self._stays_paused(entry) else entry.state for entry in self._own())
        counts = ", ".join(f"{states[state]} {word}" for state, word in WORDS.items() if states[state])
        return f"{self._done()}/{self.total} trials ({counts}){self._best()}{self._left()}"

    def _observe(self, event: Event, entry: Entry) -> None:
        if self.console.is_terminal or not entry.ran or entry.imported is not None:
            return
        line = {"propose": "started", "promote": "goes on", "result": "step"}.get(event["event"], WORDS[entry.state])
        if event["event"] == "result":
            line = f"step {event['step']}/{self.total_steps}: {self._values(event['values'])}"
        if event["event"] in ("end", "pause"):
            line += f" ({entry.reason})" if entry.reason else ""
            line += f" | {self.summary()}"
        self.console.print(
            f"{time.strftime('%H:%M:%S')} {entry.trial_id} {line}", markup=False, highlight=False, soft_wrap=True
        )

    def _values(self, values: dict[str, Any]) -> str:
        known = [o.metric for o in self.objectives if o.metric in values]
        return ", ".join(f"{name.removeprefix('held_out_')} {values[name]:.4f}" for name in known)

    def _own(self) -> list[Entry]:
        return [entry for entry in self.record.trials() if entry.imported is None]

    def _done(self) -> int:
        return sum(entry.state not in (RUNNING, PAUSED) or self._stays_paused(entry) for entry in self._own())

    def _stays_paused(self, entry: Entry) -> bool:
        """Whether a trial was paused for good: nothing runs, nothing is to start, and none is promoted any more."""
        return entry.state == PAUSED and not self._goes_on()

    def _goes_on(self) -> bool:
        own = self._own()
        if any(entry.state == RUNNING for entry in own) or len(own) < self.total:
            return True
        return self.halving.promotable(self.record.entries, closing=True) is not None

    def _best(self) -> str:
        first = self.objectives[0]
        found = [e.values[0] for e in self.record.trials() if e.values is not None and e.searched]
        if not found:
            return ""
        best = min(found) if first.mode == "min" else max(found)
        return f", best {first.metric.removeprefix('held_out_')} {best:.4f}"

    def _left(self) -> str:
        """At the pace of this life of the sweep, in steps of all trials together."""
        done, seconds, left = self._steps_done() - self.steps_before, self.clock() - self.began, self._steps_left()
        if not done or not self._goes_on():
            return ""
        wait = max(1.0, seconds / done * left)  # what runs still has to be saved and logged
        return f", about {wait / 60:.0f} min left" if wait >= 90 else f", about {wait:.0f} s left"

    def _steps_done(self) -> int:
        return sum(map(_reached, self._own()))

    def _steps_left(self) -> int:
        """Steps that are still to be trained, if each rung promotes as many trials as it may."""
        others = [entry for entry in self._own() if not entry.searched]
        left = sum(self.total_steps - _reached(entry) for entry in others if entry.state == RUNNING)
        left += max(self.total - self.samples - len(others), 0) * self.total_steps
        searched = [entry for entry in self._own() if entry.searched]
        alive = [entry for entry in searched if entry.state not in (FAIL, PRUNED)]
        coming, low = self.samples - len(searched) + len(alive), 0
        for high in [*self.halving.rungs, self.total_steps]:
            count = max(coming, sum(self._passes(entry, low) for entry in alive))
            done = sum(min(max(self._at(entry) - low, 0), high - low) for entry in alive)
            left += count * (high - low) - done
            coming, low = max(count // self.halving.config.reduction_factor, min(count, 1)), high
        return left

    def _at(self, entry: Entry) -> int:
        """A trial's step; trials may have stages of their own, and be whole before `total_steps`."""
        return self.total_steps if entry.state == COMPLETE else min(_reached(entry), self.total_steps)

    def _passes(self, entry: Entry, rung: int) -> bool:
        """Whether a trial is beyond a rung, or on its way there."""
        return self._at(entry) > rung or (entry.state == RUNNING and (entry.until is None or entry.until > rung))


def _reached(entry: Entry) -> int:
    return max(entry.steps, default=0)
