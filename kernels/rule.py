"""What is selected from: indexer scores, what queries ask for, and the rule that makes a selection of them."""

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Rule:
    """How scores become a selection: indexer kind, controller and options of selection, named as in GSA's settings.

    The controller `given` takes the numbers of keys from the caller.
    """

    kind: str = "gated_sigmoid"  # gated_sigmoid, sigmoid, relu
    controller: str = "given"  # given, threshold, variance, entropy
    k: int = 2048
    k_min: int = 1
    k_max: int = 2048
    temperature: float = 1.0  # of variance and entropy
    tau: float = 10.0  # factor on scores in the entropy's softmax
    threshold: float = 1.0
    local_window: int = 0
    sink_tokens: int = 0
    share: int = 1
    block: int = 0  # keys of a block on the first of two levels; 0: one level
    candidates: int = 8  # keys scored on the second level, as a multiple of k

    def most(self, num_keys: int) -> int:
        """A bound on the keys that a query selects, before windows are shared."""
        most = self.k_max
        if self.controller in ("variance", "entropy"):
            most = min(most, max(self.k_min, math.ceil(1.5 * self.k)))
        return min(num_keys, max(most, self.local_window + self.sink_tokens))

    def most_attended(self, num_keys: int) -> int:
        """A bound on the keys that a query attends to."""
        return min(num_keys, self.most(num_keys) + (self.share if self.share > 1 else 0))

    def two_levels(self, num_keys: int) -> bool:
        """Whether there may be keys that are no candidates: not where as many are wanted as there are keys."""
        return self.block > 0 and num_keys > self.candidates * self.k_min

    def blocks(self, nominal: Any) -> Any:
        """How many of the best blocks are looked into, for a nominal number of keys."""
        return (nominal * self.candidates + self.block - 1) // self.block


class Scores(NamedTuple):
    """What indexer scores are made of, for R queries and S keys."""

    q: Tensor  # [B, R, H_I, d_I]
    k: Tensor  # [B, S, d_I]
    weight: Tensor | None  # [B, R, H_I]
    bias: Tensor | None  # [H_I]

    def at(self, rows: Tensor) -> "Scores":
        """Those of the queries whose numbers are `rows` [B, R']."""
        q = self.q.gather(1, rows[..., None, None].expand(-1, -1, *self.q.shape[2:]))
        weight = self.weight
        if weight is not None:
            weight = weight.gather(1, rows[..., None].expand(-1, -1, weight.shape[2]))
        return self._replace(q=q, weight=weight)

    def rows(self, rows: slice) -> "Scores":
        return self._replace(q=self.q[:, rows], weight=None if self.weight is None else self.weight[:, rows])


class Asked(NamedTuple):
    """What R queries may choose from and how much."""

    starts: Tensor  # [B, R] the first key that a query sees
    lasts: Tensor  # [B, R] and the last; less than the first where it sees none
    nominal: Tensor  # [B, R] the number of keys by which candidates are counted
    wanted: Tensor  # [B, R] the number of keys wanted, where the rule's controller is `given`

    def at(self, rows: Tensor) -> "Asked":
        return Asked(*(x.gather(1, rows) for x in self))

    def rows(self, rows: slice) -> "Asked":
        return Asked(*(x[:, rows] for x in self))

    @property
    def available(self) -> Tensor:
        return (self.lasts - self.starts + 1).clamp_min(0)


def scores_definition(scores: Scores, kind: str) -> Tensor:
    """I[t, s] = Σ_j w[t, j] · σ(q[t, j]·k[s] / √d_I + b_j), [B, R, S] in fp32 or better; `relu` has no bias."""
    precise = torch.promote_types(scores.q.dtype, torch.float32)
    each = torch.einsum("brjd,bsd->brjs", scores.q.to(precise), scores.k.to(precise)) / math.sqrt(scores.q.shape[3])
    if kind == "relu":
        each = each.relu()
    elif scores.bias is not None:
        each = (each + scores.bias.to(precise)[:, None]).sigmoid()
    return each.sum(2) if scores.weight is None else torch.einsum("brjs,brj->brs", each, scores.weight.to(precise))
