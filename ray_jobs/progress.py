"""Live progress: a table that redraws itself on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ray_jobs.events import Event
from ray_jobs.objectives import ObjectiveConfig
from ray_jobs.record import COMPLETE, FAIL, PAUSED, PRUNED, RUNNING, Entry, Record

WORDS = {COMPLETE: "finished", PRUNED: "stopped early", FAIL: "failed", PAUSED: "paused", RUNNING: "running"}


class SweepProgress:
    """Follows a sweep's record.

    Args:
        record: of the sweep.
        objectives: of the sweep; the first decides which trial is best so far.
        total: trials of the whole sweep, baselines included.
        total_steps: optimizer steps of one trial.
        console: where to print.
    """

    def __init__(
        self, record: Record, objectives: list[ObjectiveConfig], total: int, total_steps: int, console: Console
    ) -> None:
        self.record, self.objectives, self.total, self.total_steps = record, objectives, total, total_steps
        self.console, self.began, self.live = console, time.monotonic(), None
        self.done_before = self._done()

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
        states = Counter(entry.state for entry in self.record.trials() if entry.imported is None)
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

    def _done(self) -> int:
        return sum(entry.state != RUNNING for entry in self.record.trials() if entry.imported is None)

    def _best(self) -> str:
        first = self.objectives[0]
        found = [e.values[0] for e in self.record.trials() if e.values is not None and e.searched]
        if not found:
            return ""
        best = min(found) if first.mode == "min" else max(found)
        return f", best {first.metric.removeprefix('held_out_')} {best:.4f}"

    def _left(self) -> str:
        done, seconds = self._done() - self.done_before, time.monotonic() - self.began
        if not done:
            return ""
        left = seconds / done * (self.total - self._done())
        return f", about {left / 60:.0f} min left" if left >= 90 else f", about {left:.0f} s left"
