"""Optuna as a Ray Tune searcher.

- Sampling is define-by-run, so conditional and per-layer spaces need no flattening.
- A trial that the scheduler stopped is told as PRUNED, one that failed or ended in a value that is not finite as
  FAIL: neither enters the model of good values at its low fidelity.
- The study lives in memory and is rebuilt from the sweep's record. Sampling for proposal n is seeded by the sweep's
  seed and n alone.
"""

import dataclasses
import hashlib
import json
import math
import warnings
from collections import Counter
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import TrialState
from ray.tune.search import Searcher

from gsa.errors import ConfigError, RunError
from gsa.settings import setting
from ray_jobs.record import COMPLETE, FAIL, PRUNED, RUNNING, Entry, Params, Record
from ray_jobs.space import Space

SAMPLERS = ("tpe", "random", "nsga2")
REJECTIONS = 200  # invalid proposals in a row after which the space is held to be empty

# what a search may aim at: metrics of the last evaluation
METRICS = (
    "held_out_loss",
    "held_out_bits_per_byte",
    "held_out_selected_fraction",
    "held_out_k_mean",
    "held_out_mass_kept",
    "held_out_first_token_mass",
    "held_out_max_activation",
    "tokens_per_second",
)


@dataclasses.dataclass
class ObjectiveConfig:
    metric: str = setting("held_out_loss", "metric of the last evaluation", choices=METRICS)
    mode: str = setting("min", "whether less or more is better", choices=("min", "max"))


@dataclasses.dataclass
class SearcherConfig:
    sampler: str = setting("tpe", "Optuna sampler: multivariate grouped TPE, random, or NSGA-II", choices=SAMPLERS)
    startup_trials: int = setting(6, "trials drawn at random before TPE has a model", ge=1)


def trial_id(number: int, params: Params) -> str:
    """A trial's name: its number, and what it tries. The same proposal has the same name in every life of a sweep."""
    digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()
    return f"{number:05d}-{digest[:8]}"


class OptunaSearcher(Searcher):
    """Proposes trials to Tune: unfinished trials of the record first, then new ones.

    Args:
        space: what is searched.
        objectives: metrics and directions, at least one.
        config: sampler settings.
        seed: of the sampling.
        num_samples: proposals in the whole sweep, earlier lives included.
        record: of the sweep; takes proposals, results and ends.
        max_failures: times a trial whose process died is proposed again, to go on from its checkpoint. (Tune's own
            option starts no trial again that died while it was starting.)
    """

    def __init__(
        self,
        space: Space,
        objectives: list[ObjectiveConfig],
        config: SearcherConfig,
        seed: int,
        num_samples: int,
        record: Record,
        max_failures: int = 0,
    ) -> None:
        super().__init__(metric=objectives[0].metric, mode=objectives[0].mode)
        self.space, self.objectives, self.config, self.seed = space, objectives, config, seed
        self.num_samples, self.record = num_samples, record
        self.interrupted = False  # trials that end from now on were cut off, and stay unfinished in the record
        self._waiting = [entry for entry in record.trials() if entry.state == RUNNING]
        self._ids: dict[str, str] = {}  # Tune's id of a trial to ours
        self._running: set[str] = set()  # ours
        self.max_failures = max_failures
        self._failures: Counter[str] = Counter()
        self._live: dict[str, optuna.Trial] = {}
        self._study = self._rebuild()

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True  # the objectives are known from the start

    @property
    def remaining(self) -> int:
        """Trials that are still to be proposed or continued."""
        searched = [entry for entry in self.record.trials() if not entry.baseline]
        return len(self._waiting) + max(0, self.num_samples - len(searched))

    def suggest(self, trial_id: str) -> Any:
        """The next trial to run; invalid proposals are told to Optuna as failed, at no cost.

        Raises:
            RunError: nothing valid was found in many draws.
        """
        if not self.remaining:
            return None if self._running else Searcher.FINISHED  # one that runs may have to run again
        entry = self._waiting.pop(0) if self._waiting else self._propose()
        self._ids[trial_id] = entry.trial_id
        self._running.add(entry.trial_id)
        return entry.proposal()

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        values = {o.metric: float(result[o.metric]) for o in self.objectives if o.metric in result}
        if len(values) == len(self.objectives):
            self.record.result(self._ids[trial_id], int(result["step"]), values)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        own = self._ids[trial_id]
        self._running.discard(own)
        if self.interrupted or self.record.entries[own].state != RUNNING:
            return
        result = result or {}
        self.on_trial_result(trial_id, result)  # Tune tells the last one only here
        values = [float(result.get(o.metric, math.nan)) for o in self.objectives]
        if error:
            self._failures[own] += 1
            if self._failures[own] <= self.max_failures:
                self._waiting.append(self.record.entries[own])
            else:
                self._end(own, FAIL, reason=f"its process died {self._failures[own]} times")
        elif result.get("failed"):
            self._end(own, FAIL, reason=str(result["failed"]))
        elif not all(math.isfinite(v) for v in values):
            self._end(own, FAIL, reason=f"objectives are {values}")
        elif result.get("complete"):
            self._end(own, COMPLETE, values)
        else:
            self._end(own, PRUNED)

    def save(self, checkpoint_path: str) -> None:
        """The record is on disk already."""

    def restore(self, checkpoint_path: str) -> None:
        raise RunError("a sweep is continued from its record, not from Tune's own state")

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles whatever refers to it into a state that nobody restores

    def _propose(self) -> Entry:
        for _ in range(REJECTIONS):
            number = sum(not entry.baseline for entry in self.record.entries.values())
            self._study.sampler = self._sampler(number)
            trial = self._study.ask()
            params = self.space.sample(trial)
            entry = Entry(trial_id(number, params), params, self.space.settings(params))
            try:
                self.space.compose(entry.settings)
            except ConfigError as error:
                entry.state, entry.reason, entry.ran = FAIL, str(error), False
                self._study.tell(trial, state=TrialState.FAIL)
                self.record.propose(entry)
                continue
            self._live[entry.trial_id] = trial
            self.record.propose(entry)
            return entry
        raise RunError(f"the space has no valid combination in {REJECTIONS} draws; the last: {entry.reason}")

    def _end(self, own: str, state: str, values: list[float] | None = None, reason: str = "") -> None:
        if own in self._live:
            trial, entry = self._live.pop(own), self.record.entries[own]
            for step, value in self._intermediate(entry).items():
                trial.report(value, step)
            self._study.tell(trial, values, TrialState[state])
        self.record.end(own, state, values, reason)

    def _intermediate(self, entry: Entry) -> dict[int, float]:
        """The first objective by step; Optuna takes none where there are several objectives."""
        if len(self.objectives) > 1:
            return {}
        found = {step: values[self.objectives[0].metric] for step, values in entry.steps.items()}
        return {step: value for step, value in found.items() if math.isfinite(value)}

    def _rebuild(self) -> optuna.Study:
        """The Optuna study that the record stands for."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=ExperimentalWarning)  # `group`, which conditional spaces need
        study = optuna.create_study(directions=["minimize" if o.mode == "min" else "maximize" for o in self.objectives])
        by_key = {dimension.key: dimension for dimension in self.space.dimensions}
        for entry in self.record.entries.values():
            if entry.baseline:
                continue
            params = {key: by_key[key].internal(value) for key, value in entry.params.items()}
            distributions = {key: by_key[key].distribution() for key in params}
            if entry.state == RUNNING:
                study.enqueue_trial(params)
                self._live[entry.trial_id] = study.ask(distributions)
            else:
                reported = self._intermediate(entry)
                values = entry.values
                if entry.state == PRUNED and reported:
                    values = [reported[max(reported)]]  # what Optuna makes of a pruned trial that is told
                study.add_trial(
                    optuna.trial.create_trial(
                        state=TrialState[entry.state],
                        params=params,
                        distributions=distributions,
                        values=values,
                        intermediate_values=reported,
                    )
                )
        return study

    def _sampler(self, number: int) -> BaseSampler:
        seed = (self.seed * 1_000_003 + number) % 2**32
        if self.config.sampler == "random":
            return RandomSampler(seed=seed)
        if self.config.sampler == "nsga2":
            return NSGAIISampler(seed=seed)
        return TPESampler(
            n_startup_trials=self.config.startup_trials, multivariate=True, group=True, constant_liar=True, seed=seed
        )
