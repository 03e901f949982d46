"""Record a table of trained trials, on which searches can be replayed in seconds: `tests/bench/trials.jsonl.gz`.

    python -m tests.bench.record --trials 600 --processes 16 --seconds 560 OUT.jsonl

Each trial is drawn at random from the space of the quickstart sweep and trained as a trial of it is, but for fewer
steps and with smaller batches, on a CPU with one thread. A line holds its parameters, the objectives at every
evaluation and the seconds that it trained. Run again with the same file, it goes on where it was stopped.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import optuna
import torch

from gsa.data.packing import prepare
from gsa.errors import ConfigError, RunError
from gsa.training.loop import Trainer
from ray_jobs.space import Space
from ray_jobs.sweep import load_sweep

SHORTER = [
    "train.training.batch_size=4",
    "train.training.micro_batch_size=4",
    "train.training.stages=[{kind: dense, steps: 90}, {kind: warmup, steps: 12}, {kind: sparse, steps: 48}]",
    "train.training.checkpoint_every=1000",
    "train.evaluation.every=15",
    "train.evaluation.sequences=16",
]
OBJECTIVES = ("held_out_bits_per_byte", "held_out_selected_fraction")


def base() -> dict[str, Any]:
    """The training configuration that each trial starts from."""
    return dataclasses.asdict(load_sweep("configs/sweep/quickstart.yaml", SHORTER).train)


def draw(space: Space, number: int) -> dict[str, Any]:
    """The parameters of the trial of this number."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=number))
    return space.sample(study.ask())


def train(number: int) -> dict[str, Any] | None:
    """One line of the table; None where the space holds no such combination."""
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sweep = load_sweep("configs/sweep/quickstart.yaml", SHORTER)
    space = Space(sweep.space, base())
    params = draw(space, number)
    try:
        config = space.compose(space.settings(params))
    except ConfigError:
        return None
    steps: dict[int, list[float]] = {}
    began = time.perf_counter()
    data = prepare(config.data, Path(config.storage) / "data")
    reason = ""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, data, Path(folder))

        def log(step: int, metrics: dict[str, float]) -> None:
            if OBJECTIVES[0] in metrics:
                steps[step] = [round(metrics[name], 5) for name in OBJECTIVES]

        try:
            trainer.train(log)
        except RunError as error:
            reason = str(error)
    seconds = round(time.perf_counter() - began, 2)
    return {"number": number, "params": params, "steps": steps, "seconds": seconds, "failed": reason}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trials", type=int, default=600)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after these")
    asked = parser.parse_args()
    done = set()
    if asked.out.exists():
        done = {json.loads(line)["number"] for line in asked.out.read_text().splitlines()}
    deadline = time.monotonic() + asked.seconds
    sweep = load_sweep("configs/sweep/quickstart.yaml", SHORTER)
    prepare(sweep.train.data, Path(sweep.train.storage) / "data")  # once, before many want it
    numbers = [n for n in range(asked.trials) if n not in done]
    random.Random(0).shuffle(numbers)
    context = multiprocessing.get_context("spawn")
    with context.Pool(asked.processes) as pool, asked.out.open("a") as file:
        for line in pool.imap_unordered(train, numbers):
            if line is not None:
                file.write(json.dumps(line) + "\n")
                file.flush()
            if time.monotonic() > deadline:
                pool.terminate()
                break


if __name__ == "__main__":
    main()
