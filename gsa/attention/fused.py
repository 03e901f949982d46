"""The core on the kernels: selections are words, and no tensor of scores or attention exists.

The kernels want fp16 or bf16 tensors on a GPU; in Triton's interpreter they run in fp32 on a CPU.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from gsa.attention.chunked import controller_loss, look
from gsa.attention.config import AttentionConfig
from gsa.attention.controller import Learned, Uncertainty
from gsa.attention.core import Asked, Attended, Parts, Projected
from gsa.attention.selection import Blocks, Queries
from gsa.attention.statistics import Sums, add, selection_sums
from kernels.attend import attend
from kernels.dense import attend_all
from kernels.divergence import divergence
from kernels.rule import Rule, Scores
from kernels.select import select
from kernels.support import INTERPRET
from kernels.support import problem as problem_of_machine
from kernels.windows import firsts_of, spread, visible
from kernels.words import pack, unpack

HEAD_SIZES = (16, 32, 64, 128)
INDEX_HEADS = 8
INDEX_SIZE = 128


def problem(parts: Parts, tokens: Projected) -> str | None:
    """Why the kernels cannot do this, in one line; `None` where they can."""
    machine: str | None = None if INTERPRET else problem_of_machine()
    if machine is not None:
        return machine
    config = parts.config
    if not tokens.q.is_cuda and not INTERPRET:
        return f"tensors are on {tokens.q.device.type}"
    if tokens.q.dtype not in (torch.bfloat16, torch.float16) and not (INTERPRET and tokens.q.dtype == torch.float32):
        remedy = "set training.precision to auto or bf16, or run it under torch.autocast"
        return f"tensors are {tokens.q.dtype}: torch.bfloat16 or torch.float16 are needed; {remedy}"
    if config.head_dim not in HEAD_SIZES:
        return f"head_dim = {config.head_dim} is none of {', '.join(map(str, HEAD_SIZES))}"
    if config.sparse and (config.indexer.num_heads > INDEX_HEADS or config.indexer.head_dim > INDEX_SIZE):
        shape = f"{config.indexer.num_heads}x{config.indexer.head_dim}"
        return f"the indexer's {shape} heads are more than {INDEX_HEADS}x{INDEX_SIZE}"
    return None


def attend_fused(parts: Parts, tokens: Projected, asked: Asked) -> Attended:
    """Scores, selection, attention and losses of T tokens (`gsa.attention.core`)."""
    config, num_keys, share = parts.config, tokens.k.shape[1], parts.config.selection.share
    sparse = config.sparse and asked.stage == "sparse"
    scores = _scores(parts, tokens)
    trains = asked.indexer_loss and asked.stage != "dense" and scores is not None
    if not tokens.q.shape[1]:
        return Attended(torch.zeros_like(tokens.q), None, asked.leader, None, None, {})
    selects = sparse and not keeps_all(config, num_keys)
    keeps = asked.keep_selection and sparse
    if not (selects or trains or keeps or tokens.packed or num_keys > tokens.q.shape[1] or asked.measure):
        q, k, v = (x.transpose(1, 2) for x in (tokens.q, tokens.k, tokens.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        return Attended(attended, None, asked.leader, None, None, {})

    words, leader, most, statistic = None, asked.leader, num_keys, None
    if scores is not None and (selects or (trains and _watches(parts))):
        rule = rule_of(parts)
        words, statistic, led = _select(parts, tokens, scores, asked.leader, rule)
        if selects:
            most, leader = rule.most_attended(num_keys), led if share > 1 else leader
    if not selects:
        words = visible(tokens.own_starts, tokens.positions, num_keys)
    elif words is None:
        assert asked.lower is not None  # the layer checks
        words = pack(asked.lower) if asked.lower.dtype == torch.bool else asked.lower
        if share > 1:
            firsts = firsts_of(tokens.own_starts, tokens.positions, share)
            places = tokens.positions.expand_as(firsts)
            words, leader = spread(words, asked.leader, firsts - tokens.positions[0], firsts, places)
    assert words is not None

    deterministic = torch.are_deterministic_algorithms_enabled()
    frozen = not (torch.is_grad_enabled() and (tokens.q.requires_grad or tokens.v.requires_grad))
    if frozen and not selects and not tokens.packed and num_keys == tokens.q.shape[1]:  # as in the warm-up
        attended, lse = attend_all(tokens.q, tokens.k, tokens.v)
    else:
        attended, lse = attend(tokens.q, tokens.k, tokens.v, words, most, deterministic)
    loss = None
    if trains and scores is not None:
        kind, tau = config.indexer.kind, config.indexer.temperature
        fixed = (tokens.q.detach(), tokens.k.detach(), lse, words)
        total = divergence(*fixed, *scores, most, kind, tau, torch.is_grad_enabled(), deterministic)[0]
        own = _controller_loss(parts, tokens, sparse)
        total = total if own is None else total + own
        loss = total / (tokens.own_starts <= tokens.positions).sum().clamp_min(1)
    return Attended(
        attended=attended,
        selection=words if keeps else None,
        leader=leader,
        indexer_loss=loss,
        uncertainty=_uncertainty(parts, tokens, statistic),
        sums=_measure(parts, tokens, words) if asked.measure else {},
    )


def keeps_all(config: AttentionConfig, num_keys: int) -> bool:
    """Whether every query of a layer selects all that it sees, so that there is nothing to score: in two levels too,
    which have no fewer candidates than k."""
    own = config.selection.share == 1 and not config.selection.reuse
    return own and config.controller.kind == "fixed" and config.controller.k >= num_keys


def rule_of(parts: Parts) -> Rule:
    """The layer's settings as the kernels know them."""
    config, controller = parts.config, parts.config.controller
    coarse, fixed = config.selection.coarse, controller.kind == "fixed"
    known = controller.kind in ("fixed", "ratio", "learned")
    return Rule(
        kind=config.indexer.kind,
        controller="given" if known else controller.kind,
        k=controller.k,
        k_min=controller.k if fixed else controller.k_min,
        k_max=controller.k if fixed else controller.k_max,
        temperature=controller.temperature,
        tau=config.indexer.temperature,
        threshold=controller.threshold,
        local_window=config.selection.local_window,
        sink_tokens=config.selection.sink_tokens,
        share=config.selection.share,
        block=0 if coarse is None else coarse.block,
        candidates=1 if coarse is None else coarse.candidates,
    )


def _scores(parts: Parts, tokens: Projected) -> Scores | None:
    if tokens.index_queries is None or tokens.index_keys is None:
        return None
    assert parts.indexer is not None
    queries = tokens.index_queries
    return Scores(queries.q, tokens.index_keys, queries.weight, parts.indexer.bias)


def _watches(parts: Parts) -> bool:
    """Whether the controller keeps a running mean now."""
    return parts.training and isinstance(parts.controller, Uncertainty)


@torch.no_grad()
def _select(
    parts: Parts, tokens: Projected, scores: Scores, leader: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    controller = parts.controller
    assert controller is not None
    available = tokens.positions - tokens.own_starts + 1
    nominal = controller.nominal(available)
    wanted = controller.ahead(available, tokens.hidden)
    reference = controller.reference if isinstance(controller, Uncertainty) else None
    wanted = nominal if wanted is None else wanted
    options, documents = dataclasses.astuple(rule), 0 if tokens.packed else 1
    selected: tuple[Tensor, Tensor, Tensor] = select(
        *scores, tokens.starts, nominal, wanted, reference, leader, tokens.past, *options, documents
    )
    return selected


def _uncertainty(parts: Parts, tokens: Projected, statistic: Tensor | None) -> Tensor | None:
    """Sum and number of the statistic of the queries that select for themselves: with windows, their first."""
    if statistic is None or not _watches(parts):
        return None
    place = tokens.positions - tokens.own_starts
    selects = (place >= 0) & (place % parts.config.selection.share == 0)
    return torch.stack(((statistic * selects).sum(), selects.count_nonzero().to(statistic)))


def _controller_loss(parts: Parts, tokens: Projected, sparse: bool) -> Tensor | None:
    """The learned controller's own loss, in chunks: it sorts scores, which no kernel does."""
    if not isinstance(parts.controller, Learned):
        return None
    queries, keys = tokens.index_queries, tokens.index_keys
    assert queries is not None
    assert keys is not None
    blocks = None
    if parts.config.selection.coarse is not None and sparse:
        blocks = Blocks.pool(keys.detach(), tokens.starts, parts.config.selection.coarse.block)
    total = torch.zeros((), device=keys.device)
    for rows in _chunks(parts, tokens):
        own = Queries(tokens.positions[rows], tokens.own_starts[:, rows])
        loss = controller_loss(parts, look(parts, queries.rows(rows), keys, own, blocks, tokens.hidden[:, rows]))
        assert loss is not None
        total = total + loss
    return total


def _measure(parts: Parts, tokens: Projected, words: Tensor) -> Sums:
    """Diagnosis compares with dense attention, which is made in PyTorch, chunk by chunk."""
    keys = tokens.k.repeat_interleave(tokens.q.shape[2] // tokens.k.shape[2], 2).transpose(1, 2)
    sums: Sums = {}
    for rows in _chunks(parts, tokens):
        queries = Queries(tokens.positions[rows], tokens.own_starts[:, rows])
        seen = queries.visible(keys.shape[2])
        selected = unpack(words, rows.stop - rows.start, rows.start)
        add(sums, selection_sums(tokens.q[:, rows].transpose(1, 2), keys, queries, seen, selected))
    return sums


def _chunks(parts: Parts, tokens: Projected) -> Iterator[slice]:
    step, length = parts.config.query_chunk, tokens.q.shape[1]
    return (slice(first, min(first + step, length)) for first in range(0, length, step))
