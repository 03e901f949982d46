"""What each layer of a trained model would select at a length that it need not have seen.

- Every query of a short text stands for one of the long text, as far along in it. There the controller's rule says how
  many keys it keeps; here it keeps the same share of its keys, the best by its own scores.
- From these selections comes u(B), the length of the union of B neighbours' selections over k, which is what a tile of
  B queries pays for.
- At the text's own length nothing is extrapolated: these are the model's selections. Beyond it, u(B) tends to be too
  high, since B neighbours are spread over more of a short text than of a long one.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from gsa.attention.chunked import look
from gsa.attention.config import AttentionConfig
from gsa.attention.controller import Seen, Threshold
from gsa.attention.core import Asked, Parts, Projected
from gsa.attention.selection import Blocks, Queries, top_k
from gsa.errors import RequestError
from gsa.evaluation.speed import watch_cores
from gsa.model import GSAForCausalLM

TILES = (1, 2, 4, 8, 16, 32)  # sizes B of a tile of neighbouring queries


@dataclasses.dataclass(frozen=True)
class Selected:
    """One layer's selections at a length, as means over its queries."""

    chosen: float  # keys taken for their scores
    forced: float  # keys of the local window and sinks, and of a shared window up to the query
    overlap: tuple[float, ...]  # u(B) of the chosen keys, for each B of `TILES`
    extra: tuple[float, ...]  # forced keys of a tile of B queries, for each B of `TILES`

    @property
    def keys(self) -> float:
        """Keys that a query attends to."""
        return self.chosen + self.forced

    def union(self, tile: int) -> float:
        """Keys that some query of a tile attends to; `tile` is one of `TILES`."""
        i = TILES.index(tile)
        return self.overlap[i] * self.chosen + self.extra[i]


class _Observed(NamedTuple):
    chosen: Tensor  # [B, T] at the target length
    forced: Tensor  # [B, T] at the target length
    mask: Tensor  # [B, T, S] bool, the keys chosen here


def observe(model: GSAForCausalLM, tokens: Tensor, length: int) -> list[Selected | None]:
    """Selections of each layer at `length` tokens, `None` for a dense layer.

    Args:
        model: its selections are those of the mode, training or evaluation, that it is in.
        tokens: [B, T], one document a row, T ≥ 1; those beyond `length` are left out.
        length: the target, in tokens.

    Raises:
        RequestError: there are no tokens, or `length` is below 1.
    """
    if length < 1 or not tokens.numel():
        raise RequestError(f"selections at {length} tokens from a text of {tokens.shape[1]}: both must be at least 1")
    configs = [model.config.attention_of(i) for i in range(model.config.num_layers)]
    reused = {i - c.selection.reuse for i, c in enumerate(configs) if c.sparse and c.selection.reuse}
    kept: dict[int, _Observed] = {}
    found: list[Selected | None] = []

    def see(layer: int, parts: Parts, projected: Projected, asked: Asked) -> None:
        config = parts.config
        if not config.sparse:
            found.append(None)
            return
        reuse = config.selection.reuse
        observed = kept[layer - reuse] if reuse else _own(parts, projected, length)
        observed = _shared(observed, config.selection.share)
        if layer in reused:
            kept[layer] = observed
        found.append(_summed(observed, config))

    watch_cores(model, tokens[:, :length], see)
    return found


@torch.no_grad()
def _own(parts: Parts, tokens: Projected, length: int) -> _Observed:
    """What a layer's own indexer and controller choose, query by query."""
    config, seen_length = parts.config, tokens.q.shape[1]
    queries, keys = tokens.index_queries, tokens.index_keys
    assert queries is not None
    assert keys is not None
    coarse = config.selection.coarse
    blocks = None if coarse is None else Blocks.pool(keys, tokens.starts, coarse.block)
    chunks = []
    for first in range(0, seen_length, config.query_chunk):
        rows = slice(first, min(first + config.query_chunk, seen_length))
        own = Queries(tokens.positions[rows], tokens.own_starts[:, rows])
        seen = look(parts, queries.rows(rows), keys, own, blocks, tokens.hidden[:, rows])
        chunks.append(_choose(parts, seen, own, length / seen_length))
    return _Observed(*(torch.cat(part, 1) for part in zip(*chunks, strict=True)))


def _choose(parts: Parts, seen: Seen, queries: Queries, scale: float) -> _Observed:
    """Choices of C queries that stand for those `scale` times as far along."""
    config, selection, controller = parts.config.controller, parts.config.selection, parts.controller
    assert controller is not None
    far = (seen.available * scale).ceil().long()
    wanted = controller.ahead(far, seen.hidden)
    if wanted is None:
        # a threshold is reached by a share of the keys, the other rules give a number that is bounded by k_max
        wanted = controller.wanted(seen) * (scale if isinstance(controller, Threshold) else 1)
    forced = far.clamp_max(selection.local_window + selection.sink_tokens)
    number = wanted.ceil().long().clamp(config.k_min, config.k_max)
    chosen = torch.minimum(torch.maximum(number, forced), far) - forced

    nearer = dataclasses.replace(
        selection,
        local_window=int(selection.local_window / scale),
        sink_tokens=int(selection.sink_tokens / scale),
    )
    near = queries.forced(nearer, seen.visible.shape[2])
    candidates = seen.visible & ~near
    share = chosen.double() / (far - forced).clamp_min(1)
    here = (share * (seen.available - near.sum(-1)) - 1e-9).ceil().long()
    here = torch.minimum(here, candidates.sum(-1))
    return _Observed(chosen, forced, top_k(seen.scores, candidates, torch.zeros_like(candidates), here))


def _shared(own: _Observed, share: int) -> _Observed:
    """Each query with its window's leader's choice, and the window's tokens up to itself."""
    if share == 1:
        return own
    place = torch.arange(own.mask.shape[1], device=own.mask.device)
    leader = place - place % share
    return _Observed(own.chosen[:, leader], own.forced[:, leader] + place % share, own.mask[:, leader])


def _summed(observed: _Observed, config: AttentionConfig) -> Selected:
    selection = config.selection
    forced = float(observed.forced.double().mean())
    # Local windows of neighbours lie one apart; in a shared window the later query has what the earlier one has.
    apart = 0.5 if selection.share > 1 else float(selection.local_window > 0)
    extra = tuple(forced + (tile - 1) * apart for tile in TILES)
    overlap = tuple(_overlap(observed.mask, tile) for tile in TILES)
    return Selected(float(observed.chosen.double().mean()), forced, overlap, extra)


def _overlap(mask: Tensor, tile: int) -> float:
    """u(tile) of the complete tiles of queries [B, T, S] bool; 1 where nothing is chosen."""
    tile = min(tile, mask.shape[1])
    tiles = mask[:, : mask.shape[1] // tile * tile].unflatten(1, (-1, tile))
    chosen = int(tiles.sum())
    return int(tiles.any(2).sum()) * tile / chosen if chosen else 1.0
