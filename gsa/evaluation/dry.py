"""A dry step: what an estimate of memory cannot know, a real step at the real shapes shows, before hours are spent."""

import copy
import dataclasses

import torch

from gsa.config import TrainConfig
from gsa.data.packing import Prepared, Shuffled
from gsa.errors import one_line
from gsa.evaluation.gate import GateError
from gsa.evaluation.loss import evaluate
from gsa.training.loop import make_model
from gsa.training.optimizer import make_optimizer
from gsa.training.stages import STAGES, freeze
from gsa.training.step import TrainingStep
from gsa.training.workers import Workers


def dry_step(config: TrainConfig, data: Prepared, device: torch.device, force: bool = False) -> int | None:
    """One optimizer step of each stage and one evaluated batch, at the real shapes, on real text.

    Args:
        config: a checked configuration.
        data: its text.
        device: where it would train.
        force: do it on a CPU too, where it takes as long as training's own steps.

    Returns:
        The peak of the GPU's memory in bytes, what was there before included; `None` on a CPU.

    Raises:
        GateError: the device has too little memory.
        RequestError: the kernels cannot run a layer, for example.
    """
    if device.type != "cuda" and not force:
        return None
    config = copy.deepcopy(config)  # `make_model` fills in the vocabulary's size
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        _steps(config, data, device)
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    except torch.OutOfMemoryError as error:
        key = "training.micro_batch_size"
        found = f"a step on {device} runs out of memory ({one_line(error)[:200]})"
        raise GateError("memory", found, key, config.training.micro_batch_size) from error
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _steps(config: TrainConfig, data: Prepared, device: torch.device) -> None:
    model = make_model(config, data).to(device).train()
    optimizer = make_optimizer(model, config.training.optimizer)
    once = dataclasses.replace(config.evaluation, sequences=config.evaluation.batch_size)
    asked = {(stage.kind, stage.context_length) for stage in config.training.stages if stage.steps}
    for stage, length in ((s, length) for s in STAGES for kind, length in asked if kind == s):
        if stage == "warmup" and not config.model.has_indexer:
            continue
        freeze(model, stage)
        text = data.at(length)
        batch = Shuffled(text.train, config.seed).batch(0, config.training.micro_batch_size).to(device)
        step = TrainingStep(model, stage, config.training.checkpoint_activations)
        with model.autocast():
            step(batch, measure=True).total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        evaluate(model, text, once, stage, Workers(0, 1, device))
