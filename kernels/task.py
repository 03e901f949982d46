"""Whose best keys are wanted, and what every way of finding them (`kernels.best`) starts from."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.rule import Asked, Rule, Scores
from kernels.scores import KINDS
from kernels.support import INTERPRET, next_power_of_2

Options = dict[str, int | bool]
Candidates = Callable[[slice], Tensor]  # the words of some of the queries' candidates


class Task(NamedTuple):
    """Whose best keys are wanted; as the arguments of `kernels.best.best`."""

    scores: Scores
    asked: Asked
    reference: Tensor | None
    rule: Rule
    most: int
    candidates: Candidates | None


def parts(rows: int, step: int) -> Iterator[slice]:
    """Rows, `step` at a time."""
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def number_wanted(asked: Asked, statistic: Tensor, reference: Tensor | None, rule: Rule, number: Tensor) -> Tensor:
    """k_t [B, R]: what the controller wants, in [k_min, k_max], no fewer than forced, no more than there are."""
    if rule.controller == "given":
        wanted = asked.wanted.to(torch.long)
    elif rule.controller == "threshold":
        wanted = statistic.long()
    else:
        assert reference is not None
        relative = statistic.double() / reference.double().clamp_min(1e-12)
        wanted = (rule.k * (0.5 + 1 / (1 + rule.temperature * relative))).nan_to_num(nan=rule.k).ceil().long()
    available = asked.available
    forced = torch.minimum(available, available.clamp_max(rule.local_window) + available.clamp_max(rule.sink_tokens))
    return torch.minimum(torch.maximum(wanted.clamp(rule.k_min, rule.k_max), forced), number)


def inputs_of(scores: Scores, starts: Tensor, lasts: Tensor) -> tuple[Tensor, ...]:
    """What every kernel that scores takes first."""
    none = torch.empty(0, dtype=torch.float32, device=scores.q.device)
    weight, bias = scores.weight, scores.bias
    return (
        scores.q.contiguous(), scores.k.contiguous(), none if weight is None else weight.contiguous(),
        none if bias is None else bias, starts.contiguous(), lasts.contiguous(),
    )  # fmt: skip


def shape_of(scores: Scores, rule: Rule) -> Options:
    """What a kernel's code depends on."""
    heads, size = scores.q.shape[2:]
    return {
        "KIND": KINDS[rule.kind], "HEADS": heads, "D": size, "DP": max(next_power_of_2(size), 16),
        "FAST": not INTERPRET, "RAW": heads == 1 and rule.controller == "given", "N": 16 if INTERPRET else 128,
    }  # fmt: skip
