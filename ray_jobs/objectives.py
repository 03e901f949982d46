"""What a search aims at and what it must keep to."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gsa.errors import ConfigError
from gsa.settings import setting
from ray_jobs.record import COMPLETE, Entry

# metrics of an evaluation
METRICS = (
    "held_out_loss",
    "held_out_bits_per_byte",
    "held_out_selected_fraction",
    "held_out_k_mean",
    "held_out_mass_kept",
    "held_out_first_token_mass",
    "held_out_max_activation",
    "attention_latency_ms",
    "attention_speedup",
    "peak_memory_gib",
    "loss_spikes",
    "tokens_per_second",
)
TIMED = ("attention_latency_ms", "attention_speedup", "peak_memory_gib")  # where evaluation.latency_length says
DENSE = "baseline-dense"  # the trial of the dense model

Values = Mapping[str, float]


@dataclasses.dataclass
class ObjectiveConfig:
    metric: str = setting("held_out_loss", "metric of the last evaluation", choices=METRICS)
    mode: str = setting("min", "whether less or more is better", choices=("min", "max"))

    @property
    def sign(self) -> int:
        return 1 if self.mode == "min" else -1


@dataclasses.dataclass
class ConstraintConfig:
    """A bound on a metric. A trial beyond it is kept and marked, and is never the best."""

    metric: str = setting("held_out_loss", "metric of the last evaluation", choices=METRICS)
    upper: float | None = setting(None, "the most it may be")
    lower: float | None = setting(None, "the least it may be")
    relative_to: str | None = setting(None, "dense: bounds are added to the dense model's value", choices=("dense",))

    def check(self, prefix: str) -> None:
        if (self.upper is None) == (self.lower is None):
            raise ConfigError(f"{prefix}.upper", self.upper, "set either upper or lower")

    def __str__(self) -> str:
        sign, bound = ("<=", self.upper) if self.upper is not None else (">=", self.lower)
        return f"{self.metric} {sign} {'dense + ' if self.relative_to else ''}{bound:g}"

    def violation(self, values: Values, dense: Values) -> float:
        """By how much values are beyond it; 0 or less where they are not, or the dense model's is not known yet."""
        reference = 0.0
        if self.relative_to:
            if self.metric not in dense:
                return 0.0
            reference = dense[self.metric]
        value = values.get(self.metric, math.nan)
        over = value - reference - self.upper if self.upper is not None else (self.lower or 0) + reference - value
        return over if math.isfinite(over) else math.inf


class Aims:
    """Objectives and constraints together.

    Args:
        objectives: at least one; the first ranks.
        constraints: any number.
    """

    def __init__(self, objectives: Sequence[ObjectiveConfig], constraints: Sequence[ConstraintConfig] = ()) -> None:
        self.objectives, self.constraints = list(objectives), list(constraints)
        self.metrics = list(dict.fromkeys([o.metric for o in objectives] + [c.metric for c in constraints]))

    def measured(self, result: Mapping[str, Any]) -> dict[str, float]:
        """What of a result counts."""
        return {name: float(result[name]) for name in self.metrics if name in result}

    def values(self, measured: Values) -> list[float] | None:
        """The objectives; None unless all are there and finite."""
        found = [measured.get(o.metric, math.nan) for o in self.objectives]
        return found if all(math.isfinite(value) for value in found) else None

    def violations(self, measured: Values, dense: Values) -> dict[str, float]:
        """By how much each constraint is broken; 0 or less where it holds."""
        return {str(c): c.violation(measured, dense) for c in self.constraints}

    def dense_at(self, entries: Mapping[str, Entry], step: int | None) -> Values:
        """What the dense model had reached at a step (its own last one not after it), or at its end; nothing before."""
        entry = entries.get(DENSE)
        if entry is None or not entry.steps:
            return {}
        if entry.state == COMPLETE and step is None:
            return entry.steps[max(entry.steps)]
        earlier = [s for s in entry.steps if step is not None and s <= step]
        return entry.steps[max(earlier)] if earlier else {}

    def feasible(self, entry: Entry, entries: Mapping[str, Entry]) -> bool:
        """Whether a trial that came to its end keeps to every constraint."""
        if not self.constraints:
            return True
        last = entry.steps[max(entry.steps)] if entry.steps else {}
        return all(v <= 0 for v in self.violations(last, self.dense_at(entries, None)).values())

    def order(self, points: Sequence[tuple[list[float], dict[str, float]]]) -> list[int]:
        """Points of objectives and violations from the best on, by number: those that keep to the constraints, then by
        how many fronts of better ones there are, then by the first objective."""
        if not points:
            return []
        signs = np.array([o.sign for o in self.objectives])
        values = np.array([point[0] for point in points]) * signs
        broken = np.array([sum(max(v, 0.0) for v in point[1].values()) for point in points])
        fronts = _fronts(values) if len(self.objectives) > 1 else np.zeros(len(points), dtype=int)
        return [int(i) for i in np.lexsort((values[:, 0], fronts, broken))]

    def front(self, entries: Iterable[tuple[str, list[float]]]) -> list[str]:
        """The names of those than which no other is at least as good in all and better in one, best first."""
        named = list(entries)
        if not named:
            return []
        values = np.array([v for _, v in named]) * np.array([o.sign for o in self.objectives])
        best = [i for i in range(len(named)) if not _dominates(values, values[i]).any()]
        return [named[i][0] for i in sorted(best, key=lambda i: tuple(values[i]))]


def _dominates(values: "np.ndarray[Any, Any]", one: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Which rows are at least as good as `one` everywhere and better somewhere; less is better."""
    return np.logical_and((values <= one).all(1), (values < one).any(1))


def _fronts(values: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """The number of the front that each row is on, the best one 0."""
    fronts = np.full(len(values), -1)
    number = 0
    while (fronts < 0).any():
        left = np.flatnonzero(fronts < 0)
        rest = values[left]
        better = (rest[:, None] <= rest[None]).all(2) & (rest[:, None] < rest[None]).any(2)
        fronts[left[~better.any(0)]] = number
        number += 1
    return fronts
