"""Search quality: ours, random search, and stock `OptunaSearch` with ASHA, on a table of trained trials.

    python -m tests.bench.quality --seeds 20 --budget 40

`tests/bench/trials.jsonl.gz` holds trials that were really trained (`tests.bench.record`). A proposal is answered with
the recorded trial that is nearest to it, each only once; its loss by step is replayed, and each step costs a step. At a
cost of `--budget` whole trials, a search's regret is the loss of what it holds for the best (the best of those that it
trained to the end) over the best in the table.

All run one trial at a time, with the defaults of their settings; stock also with ours (grace period and factor), as its
own are for results of any unit. A rung is where the table has a result next, for both.
"""

import argparse
import functools
import gzip
import json
import math
import statistics
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch
from scipy import stats

from gsa.config import read_yaml
from ray_jobs.halving import Halving, SchedulerConfig
from ray_jobs.objectives import Aims, ObjectiveConfig
from ray_jobs.record import Record
from ray_jobs.searcher import GsaSearcher
from ray_jobs.space import Space
from ray_jobs.studies import SearcherConfig, Studies
from tests.bench.record import base

HERE = Path(__file__).parent
LOSS = "held_out_bits_per_byte"
STEPS = 150
SPACE = read_yaml(HERE.parents[1] / "configs/sweep/quickstart.yaml")["space"]


class Table:
    """The recorded trials, each given once a search."""

    def __init__(self, space: Space) -> None:
        with gzip.open(HERE / "trials.jsonl.gz", "rt") as file:
            rows = [json.loads(line) for line in file]
        self.space = space
        self.curves = [{int(step): values[0] for step, values in row["steps"].items()} for row in rows]
        self.points = np.array([self._point(row["params"]) for row in rows])
        self.best = min(curve[STEPS] for curve in self.curves)
        self.free = np.ones(len(rows), dtype=bool)

    def nearest(self, params: dict[str, Any]) -> int:
        """The number of the free trial that is nearest."""
        distance = np.abs(self.points - self._point(params)).sum(1)
        distance[~self.free] = math.inf
        found = int(distance.argmin())
        self.free[found] = False
        return found

    def _point(self, params: dict[str, Any]) -> "np.ndarray[Any, Any]":
        """Coordinates: 0 to 1 along a number, 0 or 1 for each choice, −1 where a parameter is not there."""
        point: list[float] = []
        for dimension in self.space.dimensions:
            value = params.get(dimension.key)
            if dimension.type == "categorical":
                point += [0.5 * float(value == choice) for choice in dimension.choices]
            elif value is None:
                point.append(-1.0)
            else:
                low, high, at = dimension.low, dimension.high, float(value)
                if dimension.log:
                    low, high, at = math.log(low), math.log(high), math.log(at)
                point.append((at - low) / (high - low))
        return np.array(point)


def ours(table: Table, seed: int, budget: int, sampler: str = "tpe") -> float:
    """Regret of the searcher as the service has it."""
    with tempfile.TemporaryDirectory() as folder:
        record, aims = Record(Path(folder) / "record.jsonl"), Aims([ObjectiveConfig(LOSS)])
        halving = Halving(SchedulerConfig(), STEPS, aims)
        halving.rungs = [min(step for step in table.curves[0] if step >= rung) for rung in halving.rungs]
        studies = Studies(table.space, aims, SearcherConfig(sampler), halving.rungs, seed, record)
        searcher = GsaSearcher(studies, halving, record, 10**6)
        place: dict[str, int] = {}
        spent = 0
        for number in range(10**6):
            proposal = searcher.suggest(str(number))
            name = proposal["trial_id"]
            if name not in place:
                place[name] = table.nearest(proposal["params"])
            begin = max(record.entries[name].steps, default=0)
            until = proposal["until"] or STEPS
            spent += until - begin
            if spent > budget * STEPS:
                break
            for step, loss in table.curves[place[name]].items():
                if begin < step <= until:
                    ends = {"complete": step == STEPS, "paused": step == proposal["until"]}
                    result = {"step": step, LOSS: loss, "seconds": 0.0, **ends}
                    if step < until:
                        searcher.on_trial_result(str(number), result)
            searcher.on_trial_complete(str(number), result)
        return float(min((e.values[0] for e in record.trials() if e.values), default=math.inf) - table.best)


def random_search(table: Table, seed: int, budget: int) -> float:
    """Regret of whole trials drawn at random."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return float(min(_final(table, table.space.sample(study.ask())) for _ in range(budget)) - table.best)


def stock(table: Table, seed: int, budget: int, **settings: Any) -> float:
    """Regret of `OptunaSearch` and ASHA, called as Tune calls them, with some settings of ASHA."""
    search = OptunaSearch(table.space.sample, metric=LOSS, mode="min", sampler=optuna.samplers.TPESampler(seed=seed))
    # `sample` returns what the trial is to have; OptunaSearch wants constants, or nothing, from a function
    search._space = lambda trial: {k: v for k, v in table.space.sample(trial).items() if k not in trial.params}
    scheduler = AsyncHyperBandScheduler(time_attr="step", metric=LOSS, mode="min", max_t=STEPS, **settings)
    spent, best = 0, math.inf
    for number in range(10**6):
        name = str(number)
        proposal = search.suggest(name) or {}
        values = {k: json.loads(v) if isinstance(v, str) and v.startswith("[") else v for k, v in proposal.items()}
        curve = table.curves[table.nearest(values)]
        trial: Any = SimpleNamespace(trial_id=name, config=proposal)
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
        last = 0
        for step, loss in curve.items():
            spent += step - last
            last = step
            if spent > budget * STEPS:
                return float(best - table.best)
            result = {"step": step, LOSS: loss, "training_iteration": step}
            search.on_trial_result(name, result)
            if step == STEPS:
                best = min(best, loss)
            if step == STEPS or scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP:  # type: ignore[arg-type]
                break
        scheduler.on_trial_complete(None, trial, result)  # type: ignore[arg-type]
        search.on_trial_complete(name, result)
    raise AssertionError("unreachable")


def _final(table: Table, params: dict[str, Any]) -> float:
    return float(table.curves[table.nearest(params)][STEPS])


def interval(regrets: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    found = stats.bootstrap((regrets,), np.median, n_resamples=2000, rng=np.random.default_rng(0), method="percentile")
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def searches() -> Iterator[tuple[str, Any]]:
    yield "ours", ours
    yield "random search", random_search
    yield "OptunaSearch + ASHA", stock
    own = SchedulerConfig()
    like_ours = functools.partial(stock, grace_period=own.grace_period, reduction_factor=own.reduction_factor)
    yield "the same, our rungs", like_ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--budget", type=int, default=40, help="whole trials")
    asked = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    space = Space(SPACE, base())
    table = Table(space)
    print(f"{len(table.curves)} trials, best loss {table.best:.4f}; {asked.seeds} seeds, cost of {asked.budget} trials")
    regrets: dict[str, list[float]] = {}
    for name, search in searches():
        regrets[name] = []
        for seed in range(asked.seeds):
            table.free[:] = True
            regrets[name].append(search(table, seed, asked.budget))
        low, high = interval(regrets[name])
        print(
            f"{name:20} median regret {statistics.median(regrets[name]):.4f}, 95 % interval {low:.4f} to {high:.4f}",
            flush=True,
        )
    for name in list(regrets)[1:]:
        test = stats.wilcoxon(regrets["ours"], regrets[name], alternative="less")
        better = sum(a < b for a, b in zip(regrets["ours"], regrets[name], strict=True))
        print(f"ours below {name} in {better} of {asked.seeds} seeds, Wilcoxon p = {test.pvalue:.4f}")


if __name__ == "__main__":
    main()
