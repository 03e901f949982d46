"""The core in plain PyTorch: queries are handled in chunks, selections are booleans [B, C, S].

Runs on any device and in any precision. No [T, T, d] or [B, T, T, H] tensor ever exists.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gsa.attention.controller import Seen
from gsa.attention.core import Asked, Attended, Parts, Projected
from gsa.attention.indexer import IndexerQueries
from gsa.attention.selection import Blocks, Queries, share_windows, top_k
from gsa.attention.statistics import Sums, add, mean_attention, selection_sums


def attend_chunked(parts: Parts, tokens: Projected, asked: Asked) -> Attended:
    """Scores, selection, attention and losses of T tokens (`gsa.attention.core`)."""
    config, length, heads = parts.config, *tokens.q.shape[1:3]
    index_queries, index_keys, starts = tokens.index_queries, tokens.index_keys, tokens.own_starts
    sparse = config.sparse and asked.stage == "sparse"
    group = heads // config.num_kv_heads
    keys = tokens.k.repeat_interleave(group, 2).transpose(1, 2)  # [B, H, S, d]
    values = tokens.v.repeat_interleave(group, 2).transpose(1, 2)
    leader = asked.leader
    blocks = None
    if sparse and index_keys is not None and config.selection.coarse is not None and length:
        blocks = Blocks.pool(index_keys.detach(), tokens.starts, config.selection.coarse.block)
    outputs, selections = [], []
    losses: list[Tensor | None] = []
    uncertainties: list[Tensor | None] = []
    num_queries = torch.zeros((), dtype=torch.long, device=starts.device)  # those that see any key
    sums: Sums = {}
    for first in range(0, length, config.query_chunk):
        rows = slice(first, min(first + config.query_chunk, length))
        queries = Queries(tokens.positions[rows], starts[:, rows])
        visible = queries.visible(keys.shape[2])
        selected = visible
        seen = None
        if index_queries is not None and index_keys is not None and (sparse or asked.indexer_loss):
            seen = look(parts, index_queries.rows(rows), index_keys, queries, blocks, tokens.hidden[:, rows])
        if sparse:
            if seen is None:
                assert asked.lower is not None  # the layer checks
                selected = asked.lower[:, rows]
            else:
                assert parts.controller is not None
                with torch.no_grad():
                    selected = top_k(seen.scores, seen.visible, seen.forced, parts.controller(seen))
            if config.selection.share > 1:
                selected, leader = share_windows(selected, leader, queries, config.selection.share)
        chunk_q = tokens.q[:, rows].transpose(1, 2)  # [B, H, C, d]
        sees_any = visible.any(-1)  # [B, C]; padding before a row's first token sees nothing
        mask = (selected | ~sees_any[..., None])[:, None]  # a softmax of nothing would be NaN
        attended = F.scaled_dot_product_attention(chunk_q, keys, values, attn_mask=mask)
        outputs.append(attended * sees_any[:, None, :, None])
        num_queries = num_queries + sees_any.sum()
        if asked.keep_selection and sparse:
            selections.append(selected)
        trains = asked.indexer_loss and asked.stage != "dense"
        if trains and seen is not None and index_queries is not None and index_keys is not None:
            target = mean_attention(chunk_q, keys, selected)
            losses.append(_divergence(parts, index_queries.rows(rows), index_keys, target, selected))
            losses.append(controller_loss(parts, seen))
        if seen is not None and parts.training:
            uncertainties.append(_uncertainty(parts, seen, queries))
        if asked.measure:
            add(sums, selection_sums(chunk_q, keys, queries, visible, selected))
    known = [x for x in uncertainties if x is not None]
    terms = [x for x in losses if x is not None]
    return Attended(
        attended=torch.cat(outputs, 2).transpose(1, 2) if outputs else torch.zeros_like(tokens.q),
        selection=torch.cat(selections, 1) if selections else None,
        leader=leader,
        indexer_loss=torch.stack(terms).sum() / num_queries.clamp_min(1) if terms else None,
        uncertainty=torch.stack(known).sum(0) if known else None,
        sums=sums,
    )


@torch.no_grad()
def look(
    parts: Parts,
    index_queries: IndexerQueries,
    index_keys: Tensor,
    queries: Queries,
    blocks: Blocks | None,
    hidden: Tensor,
) -> Seen:
    """Score the keys: every visible one, or with `coarse` the candidates among them."""
    assert parts.indexer is not None
    assert parts.controller is not None
    count = index_keys.shape[1]
    visible, forced = queries.visible(count), queries.forced(parts.config.selection, count)
    available = visible.sum(-1)
    if blocks is not None:
        coarse = parts.config.selection.coarse
        assert coarse is not None
        wanted = parts.controller.nominal(available) * coarse.candidates
        kept = (wanted + coarse.block - 1) // coarse.block
        block_scores = parts.indexer.scores(index_queries, blocks.pooled)
        visible = visible & (blocks.candidates(block_scores, queries, kept) | forced)
    return Seen(parts.indexer.scores(index_queries, index_keys), visible, available, forced, hidden)


def controller_loss(parts: Parts, seen: Seen) -> Tensor | None:
    """Σ over the chunk's queries of the controller's own loss, `None` for a controller without one."""
    assert parts.controller is not None
    own = parts.controller.loss(seen)
    return None if own is None else own.sum()


def _divergence(
    parts: Parts, index_queries: IndexerQueries, index_keys: Tensor, target: Tensor, support: Tensor
) -> Tensor:
    """Σ over the chunk's queries of KL(target ‖ softmax(τ·I)) on the support."""
    indexer = parts.indexer
    assert indexer is not None

    def divergence(q: Tensor, weight: Tensor | None, keys: Tensor) -> Tensor:
        scores = indexer.scores(IndexerQueries(q, weight), keys)
        logits = (indexer.config.temperature * scores).masked_fill(~support, torch.finfo(scores.dtype).min)
        log_p = logits.log_softmax(-1).masked_fill(~support, 0)
        return (target * (target.clamp_min(1e-30).log() - log_p)).sum()

    # Scores of every chunk, by head, would add up to [B, T, H_I, T] until the backward pass: make them anew there.
    loss: Tensor = checkpoint(
        divergence, index_queries.q, index_queries.weight, index_keys, use_reentrant=False, preserve_rng_state=False
    )
    return loss


@torch.no_grad()
def _uncertainty(parts: Parts, seen: Seen, queries: Queries) -> Tensor | None:
    """Sum and number of the statistic of the queries that select for themselves: with windows, their first."""
    assert parts.controller is not None
    statistic = parts.controller.uncertainty(seen)
    if statistic is None:
        return None
    selects = (seen.available > 0) & ((queries.positions - queries.starts) % parts.config.selection.share == 0)
    return torch.stack(((statistic * selects).sum(), selects.count_nonzero().to(statistic)))
