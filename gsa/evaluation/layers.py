"""What each layer of a trained model would lose or keep with another selection, on held-out text.

Everything is measured on the layer's own exact selection: as if no layer shared windows (`selection.share` = 1), with
the indexer's scores and the controller's k as they are.

| name | is |
|---|---|
| `k_mean`, `selected_fraction`, `mass_kept`, `first_token_mass` | as in `gsa.attention.statistics` |
| `k_99` | the fewest keys, best scores first, that keep 99 % of dense attention's mass on average over queries |
| `u32` | keys of the union of 32 neighbouring queries' selections over keys of one of them |
| `share_8_lost` … | part of the mass kept that is lost where windows of 8, 16, 32 queries share a selection |
| `reuse_1_lost` | part of the mass kept that is lost with the exact selection of the layer below |

The last four lines are absent where a layer is dense or reuses a selection; `reuse_1_lost` also where there is none
below. A loss below 0 is a gain: a shared selection holds the window's own tokens besides.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from gsa.attention.attention import GatedSparseAttention
from gsa.attention.chunked import look
from gsa.attention.core import Asked, Parts, Projected
from gsa.attention.selection import Blocks, Queries, share_windows, top_k
from gsa.attention.statistics import Sums, add, mean_attention, means, selection_sums
from gsa.data.packing import Prepared
from gsa.evaluation.loss import EvaluationConfig, held_out_sequences
from gsa.evaluation.mode import evaluating
from gsa.model import GSAForCausalLM

SHARES = (8, 16, 32)
MASS = 0.99
TILE = 32  # queries of a union
CELLS = 1 << 26  # scores by head that exist at once


@torch.no_grad()
def layer_diagnostics(model: GSAForCausalLM, data: Prepared, config: EvaluationConfig) -> list[dict[str, float]]:
    """The table above by layer, on the sequences that `config` evaluates.

    Runs in plain PyTorch on the model's device; queries are handled in chunks, so that memory grows with the length
    of the text and not with its square. The model runs in its own precision.

    Args:
        model: a trained model; it is left in the mode it was in.
        data: whose held-out text is read.
        config: how many sequences, and how many at once.
    """
    device = model.embedding.weight.device
    layers = [module for module in model.modules() if isinstance(module, GatedSparseAttention)]
    totals: list[Sums] = [{} for _ in layers]
    chosen = held_out_sequences(data, config)
    try:
        with evaluating(model), model.autocast():
            for first in range(0, len(chosen), config.batch_size):
                batch = data.held_out.batch(chosen[first : first + config.batch_size]).to(device)
                _watch(layers, totals)
                model.run(batch.tokens, starts=batch.starts)
    finally:
        for layer in layers:
            layer.watch = None
    return [_named(total) for total in totals]


def _watch(layers: list[GatedSparseAttention], totals: list[Sums]) -> None:
    """Have each layer measured as the model comes to it."""
    seen: list[tuple[Parts, Projected]] = []

    def measure(parts: Parts, tokens: Projected, asked: Asked) -> None:
        layer = len(seen)
        # queries, keys and values of all layers at once would be too much; what indexers need is small
        nothing = tokens.q.new_empty(0)
        seen.append((parts, tokens._replace(q=nothing, k=nothing, v=nothing)))
        source = _source(seen, layer)
        own = source is seen[-1]
        below = _source(seen, layer - 1) if layer and own else None
        for sums in _chunks(tokens, source, below, own):
            add(totals[layer], sums)

    for layer in layers:
        layer.watch = measure


def _source(seen: list[tuple[Parts, Projected]], layer: int) -> tuple[Parts, Projected] | None:
    """The layer whose indexer chooses this layer's keys, `None` for a dense one."""
    config = seen[layer][0].config
    if not config.sparse:
        return None
    return _source(seen, layer - config.selection.reuse) if config.selection.reuse else seen[layer]


class _Selector:
    """The exact selections of one layer, chunk by chunk."""

    def __init__(self, parts: Parts, tokens: Projected) -> None:
        assert tokens.index_keys is not None
        self.parts, self.tokens, self.keys = parts, tokens, tokens.index_keys
        coarse = parts.config.selection.coarse
        self.blocks = None if coarse is None else Blocks.pool(self.keys, tokens.starts, coarse.block)

    def select(self, rows: slice, queries: Queries) -> tuple[Tensor, Tensor]:
        """Selection [B, C, S] of C queries, and the keys in the order of their scores, [B, C, S] integers."""
        assert self.tokens.index_queries is not None
        assert self.parts.controller is not None
        seen = look(
            self.parts,
            self.tokens.index_queries.rows(rows),
            self.keys,
            queries,
            self.blocks,
            self.tokens.hidden[:, rows],
        )
        selected = top_k(seen.scores, seen.visible, seen.forced, self.parts.controller(seen))
        largest = torch.finfo(seen.scores.dtype).max
        unseen = ~queries.visible(self.keys.shape[1])
        ranked = seen.scores.masked_fill(seen.forced, largest).masked_fill(unseen, -largest)
        return selected, ranked.argsort(dim=-1, descending=True, stable=True)


def _chunks(
    tokens: Projected, source: tuple[Parts, Projected] | None, below: tuple[Parts, Projected] | None, own: bool
) -> Iterator[Sums]:
    """Sums of one layer over one chunk of queries after another."""
    group = tokens.q.shape[2] // tokens.k.shape[2]
    keys = tokens.k.repeat_interleave(group, 2).transpose(1, 2)  # [B, H, S, d]
    batch, heads, count, _ = keys.shape
    if source is not None:
        heads = max(heads, source[0].config.indexer.num_heads)
    size = max(1, CELLS // (batch * heads * count * TILE)) * TILE
    selector = None if source is None else _Selector(*source)
    lower = None if below is None else _Selector(*below)
    leaders: dict[int, Tensor | None] = dict.fromkeys(SHARES)
    for first in range(0, tokens.q.shape[1], size):
        rows = slice(first, first + size)
        queries = Queries(tokens.positions[rows], tokens.own_starts[:, rows])
        visible = queries.visible(count)
        q = tokens.q[:, rows].transpose(1, 2)  # [B, H, C, d]
        selected, order = (visible, None) if selector is None else selector.select(rows, queries)
        sums = selection_sums(q, keys, queries, visible, selected)
        if own and order is not None:
            dense = mean_attention(q, keys, visible)
            sums["by_rank"] = dense.gather(-1, order).sum((0, 1)).double()
            sums["union"], sums["tile_k"] = _unions(selected)
            for share in SHARES:
                shared, leaders[share] = share_windows(selected, leaders[share], queries, share)
                sums[f"share_{share}"] = (dense * shared).sum()
            if lower is not None:
                sums["reuse_1"] = (dense * lower.select(rows, queries)[0]).sum()
        yield sums


def _unions(selected: Tensor) -> tuple[Tensor, Tensor]:
    """Of a chunk's tiles: Σ keys of their unions, and Σ keys of a query of theirs on average."""
    tiles = selected.split(TILE, 1)
    union = torch.stack([tile.any(1).sum() for tile in tiles]).sum()
    return union, torch.stack([tile.sum() / tile.shape[1] for tile in tiles]).sum()


def _named(sums: Sums) -> dict[str, float]:
    named = {name: float(mean) for name, mean in means(sums).items() if not name.startswith("gate_")}
    if "by_rank" not in sums:
        return named
    kept = sums["by_rank"].cumsum(0)
    # the sum is the whole mass but for rounding, as every visible key is ranked
    named["k_99"] = float(1 + (kept < MASS * kept[-1]).sum())
    named["u32"] = float(sums["union"] / sums["tile_k"].clamp_min(1))
    for name in (*(f"share_{share}" for share in SHARES), "reuse_1"):
        if name in sums:
            named[f"{name}_lost"] = 1 - float(sums[name] / sums["mass_kept"])
    return named
