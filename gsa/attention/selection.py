"""Which keys a query attends to, once they are scored: the k_t highest, and what is added to or shared between them.

- Everything is counted from the start of a query's own document, so a packed document selects
  what it would select alone.
- Ties go to the earlier key.
- Queries are handled in chunks; nothing here is larger than [B, C, S].
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from gsa.errors import ConfigError
from gsa.settings import setting
from kernels.levels import pool


@dataclasses.dataclass
class CoarseConfig:
    """Two-level selection: blocks are scored by their mean key, and only the best blocks' tokens exactly."""

    block: int = setting(32, "tokens per block, b", ge=1)
    candidates: int = setting(8, "keys scored exactly, as a multiple of k, m", ge=1)


@dataclasses.dataclass
class SelectionConfig:
    local_window: int = setting(0, "the last keys, the query itself included, that are always kept", ge=0)
    sink_tokens: int = setting(0, "the first keys of the document that are always kept", ge=0)
    share: int = setting(1, "queries of an aligned window that use its first query's selection; a power of two", ge=1)
    reuse: int = setting(0, "take the selection of this many layers below instead of one's own", ge=0)
    coarse: CoarseConfig | None = setting(None, "two-level selection; null scores every key")

    def check(self, prefix: str) -> None:
        if self.share & (self.share - 1):
            raise ConfigError(f"{prefix}.share", self.share, "must be a power of two")


class Queries(NamedTuple):
    """C consecutive queries and what they may see."""

    positions: Tensor  # [C] places among the keys
    starts: Tensor  # [B, C] first key of each query's document

    def visible(self, num_keys: int) -> Tensor:
        """The keys s with start ≤ s ≤ t, [B, C, S] bool."""
        keys = torch.arange(num_keys, device=self.starts.device)
        return (keys >= self.starts[..., None]) & (keys <= self.positions[:, None])

    def forced(self, config: SelectionConfig, num_keys: int) -> Tensor:
        """The visible keys that are kept in any case, [B, C, S] bool."""
        keys = torch.arange(num_keys, device=self.starts.device)
        local = keys > (self.positions - config.local_window)[:, None]
        sink = keys < (self.starts + config.sink_tokens)[..., None]
        return (local | sink) & self.visible(num_keys)


def top_k(scores: Tensor, candidates: Tensor, forced: Tensor, k: Tensor) -> Tensor:
    """Mark the `k` best candidates of each row, forced ones first, ties to the earlier key.

    Args:
        scores: [B, C, S].
        candidates: [B, C, S] bool, the keys to choose from.
        forced: [B, C, S] bool, keys that rank before all others; a subset of the candidates.
        k: [B, C] integers, at most the number of candidates of the row.

    Returns:
        [B, C, S] bool with exactly `k` keys set in each row.
    """
    infinity = torch.finfo(scores.dtype).max
    ranked = scores.masked_fill(forced, infinity).masked_fill(~candidates, -infinity)
    most = int(k.max()) if k.numel() else 0
    if not most:
        return torch.zeros_like(candidates)
    best = ranked.topk(most, dim=-1).values
    least = best.gather(-1, (k - 1).clamp_min(0)[..., None])  # the k-th best score of each row
    above = ranked > least
    tied = (ranked == least) & candidates
    room = k[..., None] - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= room))


class Blocks(NamedTuple):
    """Keys pooled by blocks that are counted from the start of each document."""

    pooled: Tensor  # [B, N, d_I] mean indexer key of each block
    of_key: Tensor  # [B, S] the block that a key belongs to

    @classmethod
    def pool(cls, keys: Tensor, starts: Tensor, size: int) -> "Blocks":
        """Pool indexer keys [B, S, d_I] of documents that begin at `starts` [B, S]."""
        return cls(*pool(keys, starts, size))

    def candidates(self, scores: Tensor, queries: Queries, blocks_kept: Tensor) -> Tensor:
        """The keys worth scoring exactly: the best complete earlier blocks, the previous block and the query's own.

        Args:
            scores: [B, C, N] of the pooled keys.
            queries: C queries.
            blocks_kept: [B, C] integers, how many of the best blocks to keep.

        Returns:
            [B, C, S] bool; not yet cut to the visible keys.
        """
        own = self.of_key[:, queries.positions]  # [B, C]
        first = self.of_key.gather(1, queries.starts)
        block = torch.arange(self.pooled.shape[1], device=scores.device)
        earlier = (block >= first[..., None]) & (block < own[..., None])
        kept = top_k(scores, earlier, torch.zeros_like(earlier), torch.minimum(blocks_kept, earlier.sum(-1)))
        kept |= (block == own[..., None]) | ((block == own[..., None] - 1) & earlier)
        return kept.gather(2, self.of_key[:, None].expand(-1, kept.shape[1], -1))


def share_windows(selected: Tensor, leader: Tensor | None, queries: Queries, share: int) -> tuple[Tensor, Tensor]:
    """Give the queries of an aligned window their first query's selection and the window's tokens up to themselves.

    Windows are aligned to the start of the document.

    Args:
        selected: [B, C, S] bool, each query's own selection.
        leader: [B, S'] bool with S' ≤ S, the selection of the leader of the window that was open when the
            queries before these ended, `None` when there are none before.
        queries: the C queries.
        share: the length of a window.

    Returns:
        The selection [B, C, S] and the leader [B, S] of the window that is open after the last query.
    """
    place = queries.positions - queries.starts
    first_of_window = queries.positions - place % share  # [B, C]
    row = first_of_window - queries.positions[0] + 1  # 0: the leader came before these queries
    carried = torch.zeros_like(selected[:, 0])
    if leader is not None:
        carried[:, : leader.shape[1]] = leader
    rows = torch.cat((carried[:, None], selected), dim=1)
    led = rows.gather(1, row.clamp_min(0)[..., None].expand_as(selected))
    keys = torch.arange(selected.shape[-1], device=selected.device)
    window = (keys >= first_of_window[..., None]) & (keys <= queries.positions[:, None])
    return led | window, led[:, -1]
