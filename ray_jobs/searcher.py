"""Optuna as a Ray Tune searcher.

- Sampling is define-by-run, so conditional and per-layer spaces need no flattening.
- A trial that the scheduler stopped is told as PRUNED, one that failed or ended in a value that is not finite as
  FAIL: neither enters the model of good values at its low fidelity.
- The study lives in memory and is rebuilt from a plain JSON record that Tune saves together with its own; sampling
  for trial n is seeded by the sweep's seed and n, so a rebuilt study goes on as the uninterrupted one would.
"""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import TrialState
from ray.tune.search import Searcher

from gsa.errors import ConfigError, RunError
from gsa.settings import setting
from ray_jobs.space import Params, Space

SAMPLERS = ("tpe", "random", "nsga2")
REJECTIONS = 200  # invalid proposals in a row after which the space is held to be empty


@dataclasses.dataclass
class ObjectiveConfig:
    metric: str = setting("held_out_loss", "metric of the last evaluation")
    mode: str = setting("min", "whether less or more is better", choices=("min", "max"))


@dataclasses.dataclass
class SearcherConfig:
    sampler: str = setting("tpe", "Optuna sampler: multivariate grouped TPE, random, or NSGA-II", choices=SAMPLERS)
    startup_trials: int = setting(6, "trials drawn at random before TPE has a model", ge=1)


@dataclasses.dataclass
class Entry:
    """What is recorded of a proposal; enough to rebuild its Optuna trial."""

    params: Params
    state: str = "RUNNING"
    values: list[float] | None = None
    intermediate: dict[str, float] = dataclasses.field(default_factory=dict)  # first objective by step
    tune_id: str | None = None
    reason: str = ""


def trial_id(number: int, params: Params) -> str:
    """A trial's name: its number, and what it tries. The same proposal has the same name in every life of a sweep."""
    digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()
    return f"{number:05d}-{digest[:8]}"


class OptunaSearcher(Searcher):
    """Proposes `{"trial_id", "settings", "params"}` to Tune.

    Args:
        space: what is searched.
        objectives: metrics and directions, at least one.
        config: sampler settings.
        seed: of the sampling.
    """

    def __init__(self, space: Space, objectives: list[ObjectiveConfig], config: SearcherConfig, seed: int) -> None:
        super().__init__(metric=objectives[0].metric, mode=objectives[0].mode)
        self.space, self.objectives, self.config, self.seed = space, objectives, config, seed
        self.entries: list[Entry] = []
        self._rebuild()

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True  # the objectives are known from the start

    def suggest(self, trial_id_of_tune: str) -> dict[str, Any]:
        """Propose a valid configuration; invalid ones are told to Optuna as failed, at no cost.

        Raises:
            RunError: nothing valid was found in many draws.
        """
        for _ in range(REJECTIONS):
            number = len(self.entries)
            self.study.sampler = self._sampler(number)
            trial = self.study.ask()
            params = self.space.sample(trial)
            self.live[number] = trial
            entry = Entry(params, tune_id=trial_id_of_tune)
            self.entries.append(entry)
            try:
                self.space.compose(self.space.settings(params))
            except ConfigError as error:
                entry.state, entry.reason, entry.tune_id = "FAIL", str(error), None
                self.study.tell(self.live.pop(number), state=TrialState.FAIL)
                continue
            settings = self.space.settings(params)
            return {"trial_id": trial_id(number, params), "params": params, "settings": settings}
        raise RunError(f"the space has no valid combination in {REJECTIONS} draws; the last: {self.entries[-1].reason}")

    def on_trial_result(self, trial_id_of_tune: str, result: dict[str, Any]) -> None:
        number, entry = self._entry(trial_id_of_tune)
        value = result.get(self.objectives[0].metric)
        if value is not None and math.isfinite(value):
            self._report(number, int(result["step"]), float(value))
            entry.intermediate[str(result["step"])] = float(value)

    def on_trial_complete(
        self, trial_id_of_tune: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        number, entry = self._entry(trial_id_of_tune)
        if entry.state != "RUNNING":
            return
        if error or result is None:
            entry.state, entry.reason = "FAIL", "the trial failed"
        else:
            values = [float(result.get(o.metric, math.nan)) for o in self.objectives]
            if not all(math.isfinite(v) for v in values):
                entry.state, entry.reason = "FAIL", f"objectives are {values}"
            elif result.get("complete"):
                entry.state, entry.values = "COMPLETE", values
            else:
                entry.state = "PRUNED"
        self.study.tell(self.live.pop(number), entry.values, TrialState[entry.state])

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_text(json.dumps([dataclasses.asdict(e) for e in self.entries]), encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        self.entries = [Entry(**e) for e in json.loads(Path(checkpoint_path).read_text(encoding="utf-8"))]
        self._rebuild()

    def _rebuild(self) -> None:
        """The Optuna study that the record stands for."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        directions = ["minimize" if o.mode == "min" else "maximize" for o in self.objectives]
        self.study = optuna.create_study(directions=directions)
        self.live: dict[int, optuna.Trial] = {}
        by_key = {dimension.key: dimension for dimension in self.space.dimensions}
        for number, entry in enumerate(self.entries):
            fixed = {key: by_key[key].internal(value) for key, value in entry.params.items()}
            self.study.enqueue_trial(fixed)
            trial = self.study.ask({key: by_key[key].distribution() for key in fixed})
            self.live[number] = trial
            for step, value in entry.intermediate.items():
                self._report(number, int(step), value)
            if entry.state != "RUNNING":
                self.study.tell(self.live.pop(number), entry.values, TrialState[entry.state])

    def _report(self, number: int, step: int, value: float) -> None:
        if len(self.objectives) == 1:  # Optuna refuses intermediate values of several
            self.live[number].report(value, step)

    def _sampler(self, number: int) -> BaseSampler:
        seed = self.seed * 1_000_003 + number
        if self.config.sampler == "random":
            return RandomSampler(seed=seed)
        if self.config.sampler == "nsga2":
            return NSGAIISampler(seed=seed)
        return TPESampler(
            n_startup_trials=self.config.startup_trials, multivariate=True, group=True, constant_liar=True, seed=seed
        )

    def _entry(self, trial_id_of_tune: str) -> tuple[int, Entry]:
        return next((i, e) for i, e in enumerate(self.entries) if e.tune_id == trial_id_of_tune)
