"""What stands between a layer's projections and its output gate: scores, selection, attention, the indexer's loss.

There are two of these cores, `chunked` in plain PyTorch and `fused` on the kernels; they take and give the same.
"""

import dataclasses
from typing import NamedTuple

from torch import Tensor

from gsa.attention.config import AttentionConfig, Stage
from gsa.attention.controller import Controller
from gsa.attention.indexer import Indexer, IndexerQueries
from gsa.attention.statistics import Sums


class Parts(NamedTuple):
    """What a layer brings to its core."""

    config: AttentionConfig
    indexer: Indexer | None
    controller: Controller | None
    training: bool


class Projected(NamedTuple):
    """T tokens among S that are held, the last of them, or those before a cache's free room."""

    hidden: Tensor  # [B, T, D]
    q: Tensor  # [B, T, H, d]
    k: Tensor  # [B, S, K, d]
    v: Tensor  # [B, S, K, d]
    index_queries: IndexerQueries | None
    index_keys: Tensor | None  # [B, S, d_I]
    starts: Tensor  # [B, S] the first position of each token's document
    own_starts: Tensor  # [B, T], `starts` of these tokens
    positions: Tensor  # [T], places of these tokens among all that are held
    packed: bool  # whether any document may start after position 0
    roomy: bool  # whether there may be free room after these tokens, in which nothing is to be looked at

    @property
    def past(self) -> Tensor | None:
        """[B], how many come before these tokens; `None` where these are all or the last."""
        if self.roomy:
            return self.positions[:1].expand(self.q.shape[0])
        return None


class Asked(NamedTuple):
    """What is wanted beyond the output."""

    stage: Stage
    lower: Tensor | None  # the selection of the layer that `selection.reuse` names, as that layer's core gave it
    leader: Tensor | None  # [B, S'] bool, the selection of the window that is open before these tokens
    keep_selection: bool
    indexer_loss: bool
    measure: bool


@dataclasses.dataclass
class Attended:
    attended: Tensor  # [B, T, H, d]
    selection: Tensor | None  # as booleans [B, T, S] or as words (`kernels.words`), where it is kept
    leader: Tensor | None  # [B, S] bool, the selection of the window that is open after these tokens
    indexer_loss: Tensor | None  # KL per query in nats, a mean; with the learned controller's own loss
    uncertainty: Tensor | None  # [2]: sum and number of the controller's statistic
    sums: Sums
