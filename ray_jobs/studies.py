"""The Optuna side of a search: one study for each rung, fed with the record's events.

A study holds what trials had reached at its rung, so that what is compared was trained equally long; proposals come
from the highest rung that has enough of them (as BOHB does; Falkner et al., arXiv 1807.01774). A trial that was stopped
is PRUNED, one that failed FAIL, neither with a value, in the study that it was drawn from; so is, as one that breaks a
constraint, what was refused before it could run.

Everything here follows from the events in their order: fed again, the studies are the same and propose the same.
"""

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Iterable
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, NSGAIIISampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from gsa.settings import setting
from ray_jobs.events import Event
from ray_jobs.objectives import Aims, ObjectiveConfig, Values
from ray_jobs.record import COMPLETE, FAIL, PAUSED, PRUNED, Entry, Params, Record, apply
from ray_jobs.space import Space

SAMPLERS = ("tpe", "random", "nsga2", "nsga3", "gp")
STUBBORN = 20  # proposals refused in a row after which they are drawn at random
EVOLUTION = ("nsga2", "nsga3")  # whose generations are of whole trials


@dataclasses.dataclass
class SearcherConfig:
    sampler: str = setting(
        "tpe", "Optuna sampler: multivariate grouped TPE, random, NSGA-II, NSGA-III, or Gaussian process",
        choices=SAMPLERS,
    )  # fmt: skip
    startup_trials: int = setting(6, "trials drawn at random before there is a model (tpe, gp)", ge=1)
    population_size: int = setting(20, "trials of a generation (nsga2, nsga3)", ge=2)


def trial_id(number: int, params: Params) -> str:
    """A trial's name: its number, and what it tries. The same proposal has the same name in every life of a sweep."""
    digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()
    return f"{number:05d}-{digest[:8]}"


class Studies:
    """Studies of a sweep.

    Args:
        space: what is searched.
        aims: objectives and constraints.
        config: sampler settings.
        rungs: steps of the rungs below the end.
        seed: of the sampling; that for proposal n depends on it and n alone.
        record: whose events so far are taken in at once.
    """

    def __init__(
        self, space: Space, aims: Aims, config: SearcherConfig, rungs: list[int], seed: int, record: Record
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=ExperimentalWarning)  # `group`, which conditional spaces need
        self.space, self.aims, self.config, self.seed, self.record = space, aims, config, seed, record
        levels: list[int | None] = [*rungs, None]  # None: the end
        self.studies = {level: optuna.create_study(directions=directions(aims.objectives)) for level in levels}
        self._values: dict[int | None, int] = dict.fromkeys(levels, 0)  # trials with values
        self._live: dict[str, tuple[int | None, optuna.Trial]] = {}  # drawn, and not told
        self.count = 0  # proposals, those that were refused included
        self._refused = 0  # the last of them
        entries: dict[str, Entry] = {}
        for event in record.events:
            entry = apply(entries, event)
            if entry is not None:
                self._take(event, entry, entries)
        record.subscribe(self.observe)

    def draw(self) -> Entry:
        """The next proposal. It has to be put into the record."""
        level = self._level()
        study = self.studies[level]
        study.sampler = self._sampler(self.count)
        before = _notes(study)
        trial = study.ask()
        params = self.space.sample(trial)
        entry = Entry(trial_id(self.count, params), params, self.space.settings(params))
        after = _notes(study)
        entry.sampler = {
            "trial": _plain(study.get_trials(deepcopy=False)[trial.number].system_attrs),
            "study": _plain({name: value for name, value in after.items() if before.get(name) != value}),
        }
        self._live[entry.trial_id] = (level, trial)
        return entry

    def observe(self, event: Event, entry: Entry) -> None:
        """Take in a new event of the record."""
        self._take(event, entry, self.record.entries)

    def _take(self, event: Event, entry: Entry, known: dict[str, Entry]) -> None:
        """Take in an event. `known` is what the record held then."""
        if event["event"] == "propose":
            self._proposed(entry, known)
        elif event["event"] == "result" and entry.searched and event["step"] in self.studies:
            self._reached(event["step"], entry, event["values"], known)
        elif event["event"] == "end" and entry.searched:
            self._ended(entry, known)

    def _proposed(self, entry: Entry, known: dict[str, Entry]) -> None:
        if entry.imported is not None:
            for step, measured in entry.steps.items():
                if step in self.studies:
                    self._reached(step, entry, measured, known)
            if entry.state == COMPLETE:
                self._reached(None, entry, entry.steps[max(entry.steps)], known)
            return
        if not entry.searched:
            return
        self.count += 1
        if entry.trial_id not in self._live:  # drawn in an earlier life
            level = self._level()
            study = self.studies[level]
            params, distributions = to_optuna(self.space, entry.params)
            study.enqueue_trial(params)
            trial = study.ask(distributions)
            for name, value in entry.sampler.get("trial", {}).items():
                study._storage.set_trial_system_attr(trial._trial_id, name, value)
            for name, value in entry.sampler.get("study", {}).items():
                study._storage.set_study_system_attr(study._study_id, name, value)
            self._live[entry.trial_id] = (level, trial)
        self._refused = 0 if entry.ran else self._refused + 1
        if not entry.ran:
            # Optuna's models know nothing of what failed, and would propose the same for ever
            self._live[entry.trial_id][1].set_constraint("valid", 1.0)
            self._tell(entry, TrialState.PRUNED)

    def _reached(self, level: int | None, entry: Entry, measured: Values, known: dict[str, Entry]) -> None:
        """A trial has values at a level."""
        values = self.aims.values(measured)
        if values is None:
            return
        self._values[level] += 1
        violations = self.aims.violations(measured, self.aims.dense_at(known, level))
        violations = {name: min(v, 1e30) for name, v in violations.items()}
        live = self._live.get(entry.trial_id)
        if live is not None and live[0] == level:
            for name, violation in violations.items():
                live[1].set_constraint(name, violation)
            self._tell(entry, TrialState.COMPLETE, values)
        else:
            params, distributions = to_optuna(self.space, entry.params)
            self.studies[level].add_trial(
                optuna.trial.create_trial(
                    params=params, distributions=distributions, values=values, constraints=violations
                )
            )

    def _ended(self, entry: Entry, known: dict[str, Entry]) -> None:
        if entry.state == COMPLETE:
            self._reached(None, entry, entry.steps[max(entry.steps)], known)
        if entry.trial_id in self._live:
            state = {FAIL: TrialState.FAIL, PRUNED: TrialState.PRUNED}[entry.state]
            if len(self.aims.objectives) == 1:  # of several, Optuna takes none before the end
                for step, value in intermediate_values(entry, self.aims).items():
                    self._live[entry.trial_id][1].report(value, step)
            self._tell(entry, state)

    def _tell(self, entry: Entry, state: TrialState, values: list[float] | None = None) -> None:
        level, trial = self._live.pop(entry.trial_id)
        if entry.reason:
            trial.set_user_attr("reason", entry.reason)
        self.studies[level].tell(trial, values, state)

    def _level(self) -> int | None:
        """The study that proposals come from: the highest with enough values, or the lowest."""
        if self.config.sampler in EVOLUTION:
            return None
        for level in reversed(self.studies):
            if self._values[level] >= self.config.startup_trials:
                return level
        return next(iter(self.studies))

    def _sampler(self, number: int) -> BaseSampler:
        config, seed = self.config, (self.seed * 1_000_003 + number) % 2**32
        if config.sampler == "random" or self._refused > STUBBORN:
            return RandomSampler(seed=seed)
        if config.sampler == "nsga2":
            return NSGAIISampler(population_size=config.population_size, seed=seed)
        if config.sampler == "nsga3":
            return NSGAIIISampler(population_size=config.population_size, seed=seed)
        if config.sampler == "gp":
            return GPSampler(n_startup_trials=config.startup_trials, seed=seed, deterministic_objective=True)
        return TPESampler(
            n_startup_trials=config.startup_trials, multivariate=True, group=True, constant_liar=True, seed=seed
        )


def _notes(study: optuna.Study) -> dict[str, Any]:
    """What samplers have noted in a study, the parents of a generation for example."""
    return dict(study._storage.get_study_system_attrs(study._study_id))


def _plain(notes: dict[str, Any]) -> dict[str, Any]:
    """Those that JSON holds as they are; others are Optuna's caches of what it can find again."""
    return {name: value for name, value in notes.items() if json.loads(json.dumps(value, default=str)) == value}


def directions(objectives: Iterable[ObjectiveConfig]) -> list[StudyDirection]:
    return [StudyDirection.MINIMIZE if o.mode == "min" else StudyDirection.MAXIMIZE for o in objectives]


def to_optuna(space: Space, params: Params) -> tuple[dict[str, Any], dict[str, optuna.distributions.BaseDistribution]]:
    """Parameters as Optuna stores them, and their distributions."""
    by_key = {dimension.key: dimension for dimension in space.dimensions}
    return {k: by_key[k].internal(v) for k, v in params.items()}, {k: by_key[k].distribution() for k in params}


def intermediate_values(entry: Entry, aims: Aims) -> dict[int, float]:
    """The first objective by step, where it is finite."""
    first = aims.objectives[0].metric
    found = {step: measured[first] for step, measured in entry.steps.items() if first in measured}
    return {step: value for step, value in found.items() if math.isfinite(value)}


def optuna_trial(entry: Entry, space: Space, aims: Aims, violations: dict[str, float]) -> FrozenTrial:
    """A trial of a sweep as Optuna shows it: PRUNED with intermediate values, FAIL with its reason."""
    params, distributions = to_optuna(space, entry.params)
    pruned = entry.state in (PRUNED, PAUSED)
    state = TrialState.PRUNED if pruned else TrialState[entry.state]
    reported = intermediate_values(entry, aims) if len(aims.objectives) == 1 else {}
    values = entry.values
    if state == TrialState.PRUNED and reported:
        values = [reported[max(reported)]]  # what Optuna makes of a pruned trial that is told
    return optuna.trial.create_trial(
        state=state, params=params, distributions=distributions, values=values, intermediate_values=reported,
        constraints=violations, user_attrs={"trial_id": entry.trial_id, "reason": entry.reason},
    )  # fmt: skip
