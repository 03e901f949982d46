"""Successive halving that pauses and promotes (Li et al., arXiv 1810.05934, algorithm 2).

Every trial runs to the first rung and pauses there, with its checkpoint. Whenever there is room, the best paused trial
among the best 1 in `reduction_factor` of a rung's goes on to the next, the highest rung first; otherwise a new trial
starts. Trials are compared only at the same rung: at equal steps, and so at equal context length too where
`training.stages` gives stages lengths of their own. What is decided depends on the record alone.
"""

import dataclasses
from collections.abc import Iterable, Mapping

from gsa.errors import ConfigError
from gsa.settings import setting
from ray_jobs.objectives import Aims
from ray_jobs.record import COMPLETE, PAUSED, Entry


@dataclasses.dataclass
class SchedulerConfig:
    kind: str = setting("halving", "halving: promote the best of each rung; none: every trial runs to its end",
                        choices=("halving", "none"))  # fmt: skip
    grace_period: int = setting(50, "optimizer steps of the first rung", ge=1)
    reduction_factor: int = setting(3, "one in this many trials goes on from each rung", ge=2)

    def refuse_short(self, total_steps: int) -> None:
        """Raise ConfigError where a trial's steps are fewer than the grace period."""
        if self.kind == "halving" and self.grace_period > total_steps:
            raise ConfigError("scheduler.grace_period", self.grace_period, f"must be <= a trial's {total_steps} steps")

    def is_rung(self, step: int) -> bool:
        """Whether a trial long enough pauses at a step."""
        rung = self.grace_period
        while self.kind == "halving" and rung < step:
            rung *= self.reduction_factor
        return self.kind == "halving" and rung == step


class Halving:
    """The rungs of a sweep.

    Args:
        config: of the rungs.
        total_steps: of a whole trial.
        aims: what trials are compared by.
    """

    def __init__(self, config: SchedulerConfig, total_steps: int, aims: Aims) -> None:
        self.config, self.aims = config, aims
        self.rungs: list[int] = []  # steps, the last of a whole trial not among them
        step = config.grace_period
        while config.kind == "halving" and step < total_steps:
            self.rungs.append(step)
            step *= config.reduction_factor

    @property
    def first(self) -> int | None:
        """Where a new trial pauses; None: nowhere."""
        return self.rungs[0] if self.rungs else None

    def after(self, rung: int | None) -> int | None:
        """The rung after one; None: the end."""
        later = [step for step in self.rungs if rung is not None and step > rung]
        return later[0] if later else None

    def promotable(self, entries: Mapping[str, Entry], closing: bool = False) -> Entry | None:
        """The paused trial that goes on now, if one does.

        Args:
            entries: all trials.
            closing: nothing else is left to do: if no trial has come to its end, the best one goes on.
        """
        for rung in reversed(self.rungs):
            ranked = self._ranked(entries, rung)
            allowed = len(ranked) // self.config.reduction_factor
            for entry in ranked[:allowed]:
                if entry.state == PAUSED and entry.until == rung:
                    return entry
        if closing and not any(entry.searched and entry.state == COMPLETE for entry in entries.values()):
            for rung in reversed(self.rungs):
                for entry in self._ranked(entries, rung):
                    if entry.state == PAUSED and entry.until == rung:
                        return entry
        return None

    def _ranked(self, entries: Mapping[str, Entry], rung: int) -> list[Entry]:
        """The trials that have reached a rung, the best first."""
        reached = list(_reached(entries.values(), rung))
        dense = self.aims.dense_at(entries, rung)
        points = []
        ranked = []
        for entry in reached:
            values = self.aims.values(entry.steps[rung])
            if values is not None:
                ranked.append(entry)
                points.append((values, self.aims.violations(entry.steps[rung], dense)))
        return [ranked[i] for i in self.aims.order(points)]


def _reached(entries: Iterable[Entry], rung: int) -> Iterable[Entry]:
    return (entry for entry in entries if entry.searched and entry.ran and rung in entry.steps)
