"""A sweep's runs in a store as a sweep leaves them, with no training."""

import dataclasses
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import optuna
import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric

from gsa.config import TrainConfig, build
from gsa.store import TrackingConfig
from gsa.tracking import OBJECTIVES, Tracking, connect
from ray_jobs.report import CONSTRAINTS, RATES
from ray_jobs.runs import run_key
from ray_jobs.space import Space
from tests.draw import Draw

BITS, FRACTION, LOSS = "held_out_bits_per_byte", "held_out_selected_fraction", "held_out_loss"
KIND = "model.attention.controller.kind"
SPACE: dict[str, Any] = {
    "training.optimizer.learning_rate": {"type": "float", "low": 1e-3, "high": 1e-2, "log": True},
    KIND: {"type": "categorical", "choices": ["fixed", "ratio"]},
    "model.attention.controller.ratio": {"type": "float", "low": 0.05, "high": 0.5, "when": {KIND: "ratio"}},
    "model.attention.gates.places": {"type": "categorical", "choices": [[], ["G1"], ["G1", "G2"]]},
    "model.layers[*].k": {"type": "int", "low": 256, "high": 1024, "step": 256},
}
STATES = ("finished", "finished", "finished", "stopped_early", "failed")
STEPS = (100, 200, 300)
LAYERS = 4  # of the default model


def aims(*metrics: str) -> list[dict[str, str]]:
    return [{"metric": metric, "mode": "max" if metric == "tokens_per_second" else "min"} for metric in metrics]


def fake_sweep(
    folder: Path,
    draw: Draw,
    states: list[str],
    objectives: list[dict[str, str]],
    reason: str = "loss is nan at step 120",
    name: str = "fake",
    space: dict[str, Any] | None = None,
    rates: dict[str, float] | None = None,
    constraints: list[dict[str, Any]] | None = None,
    confirm: int = 0,
) -> Tracking:
    """A sweep with one trial for each of `states`, and a dense baseline."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(empty_store(), folder / "mlflow.db")
    tracking = connect(TrackingConfig(), folder)
    base = dataclasses.asdict(build(TrainConfig, {}))
    checked = Space(space or SPACE, base)
    config = {"name": name, "train": base, "space": space or SPACE}
    tags = {"gsa.sweep": name, OBJECTIVES: json.dumps(objectives)}
    tags |= {CONSTRAINTS: json.dumps(constraints or []), RATES: json.dumps(rates or {})}
    parent = tracking.start_run(run_key(name), name, tags=tags)
    tracking.describe(parent, {"name": name}, yaml.safe_dump(config))
    tracking.log(parent, 0, {"floor_bigram_bits_per_byte": 3.1})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=draw.random.randrange(2**31)))
    for i, state in enumerate(states):
        params = checked.sample(study.ask())
        trial_id = f"{i:05d}-{draw.random.randrange(16**8):08x}"
        run_id = _start(tracking, name, parent, trial_id, params)
        quality = abs(float(params.get("training.optimizer.learning_rate", 5e-3)) - 4e-3) * 100 + 1.9
        logged: dict[int, dict[str, float]] = {}
        for step in {"finished": STEPS, "failed": STEPS[:1]}.get(state, STEPS[:2]):
            logged |= {step: _metrics(draw, quality + 60 / step)}
        _log(tracking, run_id, logged)
        tracking.log(run_id, STEPS[-1], {"training_seconds": 10.0 + i})
        for seed in range(3 if i < confirm else 0):
            again = _start(tracking, name, parent, f"{trial_id}-seed{seed}", params, confirms=trial_id)
            _log(tracking, again, {STEPS[-1]: _metrics(draw, quality)})
            tracking.finish(again, "finished")
        if state != "running":
            tracking.finish(run_id, state, reason if state == "failed" else "")
    run_id = _start(tracking, name, parent, "baseline-dense", {}, baseline=True)
    _log(tracking, run_id, {step: {BITS: 1.95 + 60 / step, LOSS: 1.4 + 40 / step} for step in STEPS})
    tracking.finish(run_id, "finished")
    return tracking


@functools.cache
def empty_store() -> Path:
    """Made once: MLflow takes seconds to make its tables."""
    path = Path(tempfile.mkdtemp()) / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def _start(
    tracking: Tracking,
    sweep: str,
    parent: str,
    trial_id: str,
    params: dict[str, Any],
    baseline: bool = False,
    confirms: str = "",
) -> str:
    tags = {"gsa.sweep": sweep, "gsa.trial_id": trial_id, "gsa.params": json.dumps(params)}
    tags["gsa.baseline"] = json.dumps(baseline)
    tags |= {"gsa.confirms": confirms} if confirms else {}
    return tracking.start_run(run_key(sweep, trial_id), trial_id, parent, tags)


def _log(tracking: Tracking, run_id: str, logged: dict[int, dict[str, float]]) -> None:
    metrics = [Metric(k, v, 0, step) for step, m in logged.items() for k, v in (m | {"step": float(step)}).items()]
    tracking.client.log_batch(run_id, metrics)


def _metrics(draw: Draw, bits: float) -> dict[str, float]:
    fractions = [draw.random.uniform(0.05, 0.6) for _ in range(LAYERS)]
    mean = sum(fractions) / LAYERS
    metrics = {
        BITS: bits - 0.4 * mean,
        LOSS: (bits - 0.4 * mean) * 0.7,
        FRACTION: mean,
        "tokens_per_second": 1e4 * mean,
    }
    for i, fraction in enumerate(fractions):
        metrics |= {f"layer_{i}/selected_fraction": fraction, f"layer_{i}/k_mean": 128 * fraction}
        metrics |= {f"layer_{i}/mass_kept": 1 - (1 - fraction) ** 3}
    return metrics
