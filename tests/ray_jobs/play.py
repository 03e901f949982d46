"""Sweeps of invented trials: the searcher is played as Tune plays it, with no Ray and no training."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from gsa.config import TrainConfig, build
from ray_jobs.halving import Halving, SchedulerConfig
from ray_jobs.objectives import Aims, ConstraintConfig, ObjectiveConfig
from ray_jobs.record import Record
from ray_jobs.searcher import GsaSearcher
from ray_jobs.space import Space
from ray_jobs.studies import SearcherConfig, Studies
from tests.draw import Draw

LOSS, FRACTION = ObjectiveConfig("held_out_loss"), ObjectiveConfig("held_out_selected_fraction")
MASS = ConstraintConfig("held_out_first_token_mass", upper=0.5)
BASE = dataclasses.asdict(build(TrainConfig, {}))
RATE = "training.optimizer.learning_rate"
SPACE = {
    RATE: {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
    "model.attention.controller.kind": {"type": "categorical", "choices": ["fixed", "ratio"]},
    "model.attention.controller.ratio": {
        "type": "float", "low": 0.1, "high": 0.5, "when": {"model.attention.controller.kind": "ratio"},
    },
    "model.attention.gates.places": {"type": "categorical", "choices": [[], ["G1", "G2"]]},
}  # fmt: skip
STEPS = 90


def searcher_of(
    path: Path,
    objectives: list[ObjectiveConfig],
    samples: int = 100,
    sampler: str = "tpe",
    space: Any = None,
    halving: bool = True,
    constraints: tuple[ConstraintConfig, ...] = (),
    **options: Any,
) -> GsaSearcher:
    """The searcher of the sweep whose record is at a path, as a new driver would have it."""
    record, aims = Record(path), Aims(objectives, constraints)
    rungs = Halving(SchedulerConfig("halving" if halving else "none", 10, 3), STEPS, aims)
    config = SearcherConfig(sampler, startup_trials=4, population_size=4)
    studies = Studies(Space(space or SPACE, BASE), aims, config, rungs.rungs, 7, record)
    return GsaSearcher(studies, rungs, record, samples, **options)


def loss_at(settings: dict[str, Any], step: int) -> float:
    """A loss that depends on the rate alone and falls with the steps."""
    return float(abs(math.log(settings[RATE] / 1e-3)) + 1 / step)


def result_at(settings: dict[str, Any], step: int, until: int | None) -> dict[str, Any]:
    return {
        "step": step,
        "held_out_loss": loss_at(settings, step),
        "held_out_selected_fraction": settings[RATE] * 50,
        "held_out_first_token_mass": settings[RATE] * 100,
        "seconds": step / 10,
        "complete": step == STEPS,
        "paused": step == until,
    }


def start(searcher: GsaSearcher, tune_id: str) -> dict[str, Any] | None:
    """The next trial; None where there is none now or at all."""
    proposal = searcher.suggest(tune_id)
    return None if proposal is None or proposal == Searcher.FINISHED else proposal


def train(searcher: GsaSearcher, tune_id: str, proposal: dict[str, Any], end: str = "") -> None:
    """Run a trial to its rung or its end; `end`: `failed`, `died` or `nan` instead."""
    last = proposal["until"] or STEPS
    reported = [step for step in (10, 20, 30, 60, 90) if step < last]
    for step in reported:
        searcher.on_trial_result(tune_id, result_at(proposal["settings"], step, None))
    final = result_at(proposal["settings"], last, proposal["until"])
    if end == "failed":
        final = {"failed": "loss is nan"}
    if end == "nan":
        final |= {"held_out_loss": math.nan}
    searcher.on_trial_complete(tune_id, None if end == "died" else final, error=end == "died")


def play(searcher: GsaSearcher, draw: Draw, count: int, workers: int = 3, faults: bool = True) -> int:
    """Run up to `count` starts of trials, several at once, in random order and with random ends; how many it were."""
    running: dict[str, dict[str, Any]] = {}
    for number in range(count):
        while len(running) < workers:
            tune_id = f"tune-{number}-{len(running)}-{draw.random.random()}"
            proposal = start(searcher, tune_id)
            if proposal is None:
                break
            running[tune_id] = proposal
        if not running:
            return number
        tune_id = draw.random.choice(list(running))
        end = draw.random.choice(["", "", "", "failed", "died", "nan"]) if faults else ""
        train(searcher, tune_id, running.pop(tune_id), end)
    for tune_id, proposal in running.items():
        train(searcher, tune_id, proposal)
    return count
