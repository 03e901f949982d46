"""The lightning indexer: a cheap score of every earlier token, by which each query selects its keys.

- One key of size d_I per token is shared by all indexer heads.
- Three kinds: `gated_sigmoid` (GSA, arXiv 2601.15305), `sigmoid` (no head gate) and `relu` (DeepSeek-V3.2's DSA).
- Scores are computed in at least fp32, whatever autocast says: a selection is only as exact as its scores.
"""

import dataclasses
import math

import torch
from torch import Tensor, nn

from gsa.attention.rope import rope
from gsa.errors import ConfigError
from gsa.settings import setting

KINDS = ("gated_sigmoid", "sigmoid", "relu")


@dataclasses.dataclass
class IndexerConfig:
    kind: str = setting("gated_sigmoid", "form of the score", choices=KINDS)
    num_heads: int = setting(4, "indexer heads, H_I", ge=1)
    head_dim: int = setting(64, "size of an indexer head, d_I", ge=2)
    rope: bool = setting(True, "rotate indexer queries and keys by position")
    temperature: float = setting(10.0, "factor on the scores before the softmax of the indexer's loss, tau", gt=0)

    def check(self, prefix: str) -> None:
        if self.rope and self.head_dim % 2:
            raise ConfigError(f"{prefix}.head_dim", self.head_dim, "must be even where indexer.rope is on")


@dataclasses.dataclass(frozen=True)
class IndexerQueries:
    """What queries bring to their scores."""

    q: Tensor  # [B, T, H_I, d_I]
    weight: Tensor | None  # [B, T, H_I]

    def rows(self, rows: slice) -> "IndexerQueries":
        return IndexerQueries(self.q[:, rows], None if self.weight is None else self.weight[:, rows])


class Indexer(nn.Module):
    """Scores I[t, s] = Σ_j w[t, j] · σ(q[t, j]·k[s] / √d_I + b_j), and its ablations.

    `sigmoid` leaves the head weights w out; `relu` is Σ_j w[t, j] · relu(q[t, j]·k[s] / √d_I).
    """

    def __init__(self, config: IndexerConfig, hidden_size: int, rope_theta: float) -> None:
        super().__init__()
        self.config, self.rope_theta = config, rope_theta
        self.query = nn.Linear(hidden_size, config.num_heads * config.head_dim, bias=False)
        self.key = nn.Linear(hidden_size, config.head_dim, bias=False)
        self.head_weight = nn.Linear(hidden_size, config.num_heads) if config.kind != "sigmoid" else None
        self.bias = nn.Parameter(torch.zeros(config.num_heads)) if config.kind != "relu" else None

    def forward(self, hidden: Tensor, positions: Tensor) -> tuple[IndexerQueries, Tensor]:
        """Project hidden states [B, T, D] to queries and to keys [B, T, d_I]; no gradient flows back to them."""
        hidden = hidden.detach()
        q = self.query(hidden).unflatten(-1, (self.config.num_heads, self.config.head_dim))
        k = self.key(hidden)
        if self.config.rope:
            q = rope(q, positions, self.rope_theta)
            k = rope(k.unsqueeze(2), positions, self.rope_theta).squeeze(2)
        weight = None if self.head_weight is None else self.head_weight(hidden).sigmoid()
        return IndexerQueries(q, weight), k

    def scores(self, queries: IndexerQueries, keys: Tensor) -> Tensor:
        """Scores [B, C, S] of C queries against keys [B, S, d_I], in fp32 or better."""
        precise = torch.promote_types(queries.q.dtype, torch.float32)
        with torch.autocast(keys.device.type, enabled=False):
            products = torch.einsum("bcjd,bsd->bcjs", queries.q.to(precise), keys.to(precise))
            products = products / math.sqrt(self.config.head_dim)
            each = products.relu() if self.bias is None else (products + self.bias.to(precise)[:, None]).sigmoid()
            if queries.weight is None:
                return each.sum(2)
            return torch.einsum("bcjs,bcj->bcs", each, queries.weight.to(precise))
