"""AdamW in four groups, and its schedule: linear warm-up, then a cosine."""

import dataclasses
import math
from typing import Any

import torch
from torch import nn

from gsa.model import GSAForCausalLM
from gsa.settings import setting


@dataclasses.dataclass
class OptimizerConfig:
    learning_rate: float = setting(3e-4, "peak learning rate", gt=0)
    beta1: float = setting(0.9, "AdamW's first decay rate", ge=0, lt=1)
    beta2: float = setting(0.95, "AdamW's second decay rate", ge=0, lt=1)
    weight_decay: float = setting(0.1, "decoupled weight decay, of matrices only", ge=0)
    warmup_steps: int = setting(20, "steps of linear increase of the learning rate", ge=0)
    final_ratio: float = setting(0.1, "learning rate at the end, as a share of the peak", ge=0, le=1)
    indexer_ratio: float = setting(10.0, "the indexer's learning rate, as a multiple of the model's", gt=0)
    clip_norm: float = setting(1.0, "largest gradient norm, of the model and of the indexer apart", gt=0)


def make_optimizer(model: GSAForCausalLM, config: OptimizerConfig) -> torch.optim.AdamW:
    """Groups: matrices and other parameters, of the model and of the indexer; only matrices decay."""
    indexer = {id(p) for p in model.indexer_parameters()}
    groups: list[dict[str, Any]] = []
    for of_indexer, ratio in ((False, 1.0), (True, config.indexer_ratio)):
        named = [(name, p) for name, p in model.named_parameters() if (id(p) in indexer) == of_indexer]
        groups.append({"params": [(name, p) for name, p in named if p.ndim >= 2], "ratio": ratio})
        groups.append({"params": [(name, p) for name, p in named if p.ndim < 2], "ratio": ratio, "weight_decay": 0.0})
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )


def load_optimizer(optimizer: torch.optim.AdamW, model: GSAForCausalLM, state: dict[str, Any]) -> None:
    """Give an optimizer of `make_optimizer` the moments of a saved `state_dict`.

    They are found by the names of their parameters. The groups stay the optimizer's own: a run goes on with the
    settings that it was saved with, and only the layout of the groups may differ.
    """
    own = optimizer.state_dict()
    saved = [name for group in state["param_groups"] for name in group.get("param_names", ())]
    place = {name: i for i, name in enumerate(saved or _names_in_three_groups(model))}
    names = [name for group in own["param_groups"] for name in group["param_names"]]
    moments = {i: state["state"][place[name]] for i, name in enumerate(names) if place[name] in state["state"]}
    optimizer.load_state_dict({"state": moments, "param_groups": own["param_groups"]})


def _names_in_three_groups(model: GSAForCausalLM) -> list[str]:
    """Parameters in the order of states without names: the model's matrices, its other parameters, the indexer's."""
    indexer = {id(p) for p in model.indexer_parameters()}
    named = list(model.named_parameters())
    rest = [(name, p) for name, p in named if id(p) not in indexer]
    return [
        *(name for name, p in rest if p.ndim >= 2),
        *(name for name, p in rest if p.ndim < 2),
        *(name for name, p in named if id(p) in indexer),
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Set every group's learning rate for a step counted from 0, and return the model's."""
    rate = config.learning_rate * schedule(config, step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]
    return rate


def schedule(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The learning rate at a step, as a share of the peak."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.final_ratio + (1 - config.final_ratio) * cosine


def clip(parameters: list[nn.Parameter], norm: float) -> float:
    """Clip the gradients together to a norm; returns the norm before, 0 where there are none."""
    held = [p for p in parameters if p.grad is not None]
    return float(nn.utils.clip_grad_norm_(held, norm)) if held else 0.0
