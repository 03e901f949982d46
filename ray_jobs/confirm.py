"""Is the best really better? The best of a search are trained again with other seeds, and compared."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from scipy.stats import ttest_ind_from_stats

from gsa.settings import setting
from ray_jobs.objectives import Aims
from ray_jobs.record import COMPLETE, Entry

LEVEL = 0.05  # of the test that tells two candidates apart


@dataclasses.dataclass
class ConfirmConfig:
    best: int = setting(
        0, "candidates of the Pareto front that are trained again, the best of the first objective", ge=0
    )
    seeds: int = setting(3, "further seeds of each", ge=1)


def confirmations(config: ConfirmConfig, aims: Aims, entries: Mapping[str, Entry], seed: int) -> list[Entry]:
    """The trials that repeat the best of a finished search."""
    found = []
    for trial_id in front(aims, entries)[: config.best]:
        original = entries[trial_id]
        for i in range(1, config.seeds + 1):
            settings = original.settings | {"seed": seed + i}
            found.append(Entry(f"{trial_id}-seed{seed + i}", original.params, settings, confirms=trial_id))
    return found


def front(aims: Aims, entries: Mapping[str, Entry]) -> list[str]:
    """The Pareto front of a search's whole trials that keep to the constraints, best of the first objective first."""
    whole = [e for e in entries.values() if e.searched and e.state == COMPLETE and aims.feasible(e, entries)]
    return aims.front((e.trial_id, e.values) for e in whole if e.values is not None)


@dataclasses.dataclass(frozen=True)
class Confirmed:
    """A candidate over its seeds, in the first objective."""

    trial_id: str
    values: list[float]  # the search's own first

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Of the sample."""
        return statistics.stdev(self.values) if len(self.values) > 1 else float("nan")


def indistinguishable(candidates: Sequence[Confirmed]) -> list[tuple[str, str, float]]:
    """Pairs that Welch's t-test cannot tell apart, with its p (`welch`).

    The search's own value takes no part: it was chosen for being good.
    """
    pairs = []
    for i, a in enumerate(candidates):
        for b in candidates[i + 1 :]:
            if min(len(a.values), len(b.values)) > 2:
                p = welch(a.values[1:], b.values[1:])
                if not p < LEVEL:
                    pairs.append((a.trial_id, b.trial_id, p))
    return pairs


def welch(a: Sequence[float], b: Sequence[float]) -> float:
    """p of Welch's t-test that two samples of two or more values have the same mean.

    Where neither sample varies at all, the test's limit: 1 where the means are equal, 0 where they differ.
    """
    # in exact arithmetic: rounding would give equal values a variance, and their means a difference
    first, other = ((statistics.mean(x), statistics.stdev(x)) for x in (a, b))
    if first[1] == other[1] == 0:
        return float(first[0] == other[0])
    return float(ttest_ind_from_stats(*first, len(a), *other, len(b), equal_var=False).pvalue)
