"""The indexer's loss: KL from the attention, averaged over heads, to softmax(τ · indexer score), on the selected keys.

With every visible key selected it is the loss of the indexer's warm-up. A program takes a tile of 32 queries and walks
through the union of their selections, a block of keys at a time, with all indexer heads at once: first for the sums of
the softmax, then beside the attention (`kernels.target`) for the loss and its gradients. These come of one walk and so
in the forward, where an attention made anew for them would take most of the time; the backward scales them. Only where
all keys are selected the forward has a kernel of its own, on sm_90 `kernels.dense_divergence`, and gradients are made
in the backward.

Floor: what `kernels.target` takes; and, written and read, 2 bytes for each query and key of the union.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import dense_divergence
from kernels.gradient import Gradient, add
from kernels.rule import Scores, scores_definition
from kernels.scores import KINDS, sigmoid
from kernels.support import INTERPRET, next_power_of_2, runs_triton, tuned
from kernels.target import RUNS, base_two, queries_of_targets, run_of, target_definition, targets, unit_of
from kernels.unions import causal_unions
from kernels.words import WORD, unpack

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]  # for index_q, index_k, weight and bias; empty where there is none


def divergence_definition(
    q: Tensor, k: Tensor, lse: Tensor, words: Tensor, scores: Scores, kind: str, tau: float
) -> tuple[Tensor, Gradients]:
    """The divergence of each query [B, T] and the gradients of their sum, with every attention and score at hand.

    dKL/dI = τ · (softmax(τ · I) − target), and on through the score.
    """
    support = unpack(words, q.shape[1])
    target = target_definition(q, k, lse, words)
    predicted = (tau * scores_definition(scores, kind)).to(target.dtype).masked_fill(~support, -math.inf)
    log_p = predicted - predicted.logsumexp(-1, keepdim=True)
    each_query = (target * (target.clamp_min(1e-30).log() - log_p.masked_fill(~support, 0))).sum(-1)

    of_scores = tau * (log_p.masked_fill(~support, -math.inf).exp() - target)  # [B, T, S]
    index_q, index_k, weight, bias = (None if x is None else x.to(target.dtype) for x in scores)
    assert index_q is not None
    assert index_k is not None
    scale = 1 / math.sqrt(index_q.shape[3])
    products = torch.einsum("btjd,bsd->btjs", index_q, index_k) * scale
    if bias is None:
        each, slope = products.relu(), (products > 0).to(products)
    else:
        each = (products + bias[:, None]).sigmoid()
        slope = each * (1 - each)
    of_products = of_scores[:, :, None] * slope * (1 if weight is None else weight[..., None])
    none = target.new_empty(0)
    return each_query.float(), (
        (torch.einsum("btjs,bsd->btjd", of_products, index_k) * scale).float(),
        (torch.einsum("btjs,btjd->bsd", of_products, index_q) * scale).float(),
        none.float() if weight is None else torch.einsum("bts,btjs->btj", of_scores, each).float(),
        none.float() if bias is None else of_products.sum((0, 1, 3)).float(),
    )


@torch.library.custom_op("gsa::divergence", mutates_args=())
def divergence(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    words: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    most: int,
    kind: str,
    tau: float,
    trains: bool = True,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """KL(mean over heads of softmax(q·k/√d) ‖ softmax(τ · I)) on each query's selected keys, summed over queries.

    Args:
        q: [B, T, H, d]; a fixed target: no gradient flows to it, to `k` or to `lse`.
        k: [B, S, K, d].
        lse: [B, T, H] of `kernels.attend.attend` for the same selection.
        words: [B, ⌈T/32⌉, S] int32, the selection.
        index_q: [B, T, H_I, d_I].
        index_k: [B, S, d_I].
        weight: [B, T, H_I], for all kinds but `sigmoid`.
        bias: [H_I], for all kinds but `relu`.
        most: a bound on the number of keys that one query selects.
        kind: of score (`kernels.rule.Rule`).
        tau: factor on the scores.
        trains: whether gradients will be asked for: without it they are made in the backward.
        deterministic: gradients equal from run to run.

    Returns:
        The sum in nats, fp32, to which a query without keys adds 0; and what the backward needs.
    """
    scores = Scores(index_q, index_k, weight, bias)
    at_once = _at_once(k, most, trains)
    if not runs_triton(q):
        each, gradients = divergence_definition(q, k, lse, words, scores, kind, tau)
    elif not at_once and dense_divergence.takes(q, k, scores, most):
        each, gradients = dense_divergence.divergences(q, k, lse, words, scores, kind, tau), _nothing(q)
    else:
        each, gradients = _Walk(q, k, lse, words, scores, most, kind, tau).run(at_once, deterministic)
    return each.sum(), *(gradients if at_once else _nothing(q))


def _at_once(k: Tensor, most: int, trains: bool) -> bool:
    """Whether gradients are made in the forward."""
    return trains and most < k.shape[1]


def _nothing(like: Tensor) -> Gradients:
    a, b, c, d = (like.new_empty(0, dtype=torch.float32) for _ in range(4))
    return a, b, c, d


@divergence.register_fake
def _(
    q: Tensor, k: Tensor, lse: Tensor, words: Tensor, index_q: Tensor, index_k: Tensor, weight: Tensor | None,
    bias: Tensor | None, most: int, kind: str, tau: float, trains: bool = True, deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    of_scores = _like(index_q, index_k, weight, bias) if _at_once(k, most, trains) else _nothing(q)
    return q.new_empty((), dtype=torch.float32), *of_scores


def _like(index_q: Tensor, index_k: Tensor, weight: Tensor | None, bias: Tensor | None) -> Gradients:
    shapes = [(0,) if x is None else x.shape for x in (index_q, index_k, weight, bias)]
    a, b, c, d = (index_q.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return a, b, c, d


@torch.library.custom_op("gsa::divergence_gradients", mutates_args=())
def divergence_gradients(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    words: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    most: int,
    kind: str,
    tau: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `divergence` for index_q, index_k, weight and bias in fp32; empty where there is none of these."""
    scores = Scores(index_q, index_k, weight, bias)
    if not runs_triton(q):
        return divergence_definition(q, k, lse, words, scores, kind, tau)[1]
    return _Walk(q, k, lse, words, scores, most, kind, tau).run(True, deterministic)[1]


@divergence_gradients.register_fake
def _(
    q: Tensor, k: Tensor, lse: Tensor, words: Tensor, index_q: Tensor, index_k: Tensor, weight: Tensor | None,
    bias: Tensor | None, *_: object,
) -> Gradients:  # fmt: skip
    return _like(index_q, index_k, weight, bias)


def _save(ctx, inputs, output):
    tensors, (most, kind, tau, trains, deterministic) = inputs[:8], inputs[8:]
    ctx.at_once = _at_once(tensors[1], most, trains)
    ctx.types = [None if x is None else x.dtype for x in tensors[4:]]
    ctx.options = (most, kind, tau, deterministic)
    ctx.save_for_backward(*(output[1:] if ctx.at_once else tensors))
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, grad, *_):
    saved = ctx.saved_tensors
    of_scores = saved if ctx.at_once else divergence_gradients(*saved, *ctx.options)
    scaled = [None if kind is None else (grad * x).to(kind) for x, kind in zip(of_scores, ctx.types, strict=True)]
    return None, None, None, None, *scaled, None, None, None, None, None


divergence.register_autograd(_differentiate, setup_context=_save)


def launches(fast: bool, heads: int, deterministic: bool) -> tuple[dict[str, int], dict[str, int]]:
    """How `_sums` and `_gradients` are launched: on an H100 about as fast as any that spills no registers."""
    if INTERPRET:
        return {"BLOCK": 16}, {"BLOCK": 16}
    stages = 3 if fast else 2
    wide = {"BLOCK": 128 if fast else 32, "num_warps": 8, "num_stages": stages}
    return wide, {"BLOCK": 32, "num_warps": 4 if fast and heads == 1 and not deterministic else 8, "num_stages": stages}


class _Walk:
    """What the two kernels are launched with."""

    def __init__(
        self, q: Tensor, k: Tensor, lse: Tensor, words: Tensor, scores: Scores, most: int, kind: str, tau: float
    ) -> None:
        index_heads, size = scores.q.shape[2:]
        none = torch.empty(0, dtype=torch.float32, device=q.device)
        weight, bias = scores.weight, scores.bias
        self.attention = (q.contiguous(), k.contiguous(), base_two(lse))
        self.words, self.most, self.scores, self.tau = words, most, scores, tau
        self.tensors = (
            scores.q.contiguous(), scores.k.contiguous(), none if weight is None else weight.contiguous(),
            none if bias is None else bias.contiguous(),
        )  # fmt: skip
        self.scalars = (1 / math.sqrt(size), tau)
        self.shape = {
            "KIND": KINDS[kind], "HEADS": index_heads, "PADDED": next_power_of_2(index_heads), "D": size,
            "DP": max(next_power_of_2(size), 16), "FAST": not INTERPRET,
        }  # fmt: skip

    def run(self, differentiates: bool, deterministic: bool) -> tuple[Tensor, Gradients]:
        """The divergence of each query [B, T], and the gradients of their sum or what is to be ignored."""
        q, k, _ = self.attention
        batch, length, heads, size = self.scores.q.shape
        weight, bias = self.scores.weight, self.scores.bias
        logs = torch.empty(RUNS, batch, length, dtype=torch.float32, device=q.device)
        losses = torch.zeros_like(logs)
        dq = torch.empty(RUNS if differentiates else 0, *self.scores.q.shape, dtype=torch.float32, device=q.device)
        dweight = torch.empty(dq.shape[:4], dtype=torch.float32, device=q.device)
        dbias = torch.empty_like(dweight)
        largest = logs.new_zeros(())
        if deterministic and self.scores.q.numel():
            largest = 2 * self.tau * self.scores.q.float().abs().amax() / math.sqrt(size)
            largest = largest if weight is None else largest * weight.float().abs().amax().clamp_min(1e-30)
        dk = Gradient(self.scores.k, largest, length * heads, deterministic)
        of_sums, of_gradients = launches(tuned(q), self.shape["PADDED"], deterministic)
        step = queries_of_targets(q, k.shape[1])
        for first, lists in causal_unions(self.words, length, WORD, self.most, step):
            target = targets(*self.attention, lists, first)
            sizes = (first, length, k.shape[1], lists.keys.shape[2])
            grid = (RUNS, lists.counts.shape[1], batch)
            _sums[grid](*self.tensors, *lists, *self.scalars, *sizes, logs, **self.shape, **of_sums)
            _gradients[grid](
                *self.tensors, *lists, *self.scalars, *sizes, logs, target, unit_of(q), losses, dq, dk.sum, dk.unit,
                dweight, dbias, RUNS=RUNS, ROUNDED=q.dtype != torch.float32, DIFFERENTIATES=differentiates,
                FIXED=deterministic, **self.shape, **of_gradients,
            )  # fmt: skip
        none = _nothing(q)
        return losses.sum(0), (
            dq.sum(0),
            dk.result(torch.float32),
            none[2] if weight is None else dweight.sum(0),
            none[3] if bias is None else dbias.sum((0, 1, 2)),
        )


@triton.jit
def _columns(
    index_q, weights, biases, query, batch, length,
    KIND: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Of each pair of indexer head and query: number, whether it is real, index query, weight and bias."""
    column = tl.arange(0, PADDED * 32)
    head, in_tile = column // 32, tl.min(query) + column % 32
    inside = (in_tile < length) & (head < HEADS)
    row = (batch * length + in_tile) * HEADS + head
    channel = tl.arange(0, DP)
    queries = tl.load(index_q + row[:, None] * D + channel, mask=inside[:, None] & (channel < D), other=0.0)
    weight = inside.to(tl.float32)
    bias = tl.zeros((PADDED * 32,), tl.float32)
    if KIND != 1:
        weight = tl.load(weights + row, mask=inside, other=0.0).to(tl.float32)
    if KIND != 2:
        bias = tl.load(biases + head, mask=inside, other=0.0).to(tl.float32)
    return row, inside, queries, weight, bias


@triton.jit
def _block(
    entry, list_keys, list_words, index_k, queries, weight, bias, scale, tau, batch, num_keys,
    KIND: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, FAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of BLOCK keys of a list: words, who selects them, where their index keys are, these, what each indexer head makes
    of each pair before its weight [BLOCK, PADDED · 32], and the logits [BLOCK, 32]."""
    key, word = tl.load(list_keys + entry).to(tl.int64), tl.load(list_words + entry)
    selected = ((word[:, None] >> tl.arange(0, 32)[None, :]) & 1) != 0
    channel = tl.arange(0, DP)
    place = (batch * num_keys + key)[:, None] * D + channel
    index_keys = tl.load(index_k + place, mask=(channel < D)[None, :], other=0.0)
    each = tl.dot(index_keys, tl.trans(queries), input_precision="ieee") * scale
    if KIND == 2:
        each = tl.where(each < 0, 0.0, each)
    else:
        each = sigmoid(each + bias[None, :], FAST)
    logits = tau * tl.sum(tl.reshape(each * weight[None, :], (BLOCK, PADDED, 32)), 1)
    return word, selected, place, index_keys, each, logits


@triton.jit
def _sums(
    index_q, index_k, weights, biases, list_keys, list_words, counts, scale, tau, first, length, num_keys, capacity,
    logs,
    HEADS: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, KIND: tl.constexpr,
    FAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The logarithm of Σ exp(logit) of each query over each run of its tile's list."""
    tile, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    query = first + tile * 32 + tl.arange(0, 32)
    row, inside, queries, weight, bias = _columns(
        index_q, weights, biases, query, batch, length, KIND, HEADS, PADDED, D, DP
    )
    own = batch * tl.num_programs(1) + tile
    highest, total = tl.full((32,), -1e30, tl.float32), tl.zeros((32,), tl.float32)
    begin, end = run_of(counts, own, capacity, BLOCK)
    for i in range(begin, end, BLOCK):
        word, selected, place, index_keys, each, logits = _block(
            own * capacity + i + tl.arange(0, BLOCK), list_keys, list_words, index_k, queries, weight, bias, scale, tau,
            batch, num_keys, KIND, PADDED, D, DP, FAST, BLOCK,
        )  # fmt: skip
        logits = tl.where(selected, logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher[None, :]), 0)
        highest = higher
    log = tl.where(total == 0, float("-inf"), highest + tl.log(tl.where(total == 0, 1.0, total)))
    tl.store(logs + (tl.program_id(0) * tl.num_programs(2) + batch) * length + query, log, mask=query < length)


@triton.jit
def _log_of_runs(logs, at, step, mask, RUNS: tl.constexpr):
    """The logarithm of all runs' sums together; +∞ where nothing is selected, so that no probability comes of it."""
    highest = tl.full(at.shape, float("-inf"), tl.float32)
    for run in tl.static_range(RUNS):
        highest = tl.maximum(highest, tl.load(logs + run * step + at, mask=mask, other=float("-inf")))
    total = tl.zeros(at.shape, tl.float32)
    for run in tl.static_range(RUNS):
        log = tl.load(logs + run * step + at, mask=mask, other=float("-inf"))
        total += tl.where(log == float("-inf"), 0.0, tl.exp(log - highest))
    return tl.where(highest == float("-inf"), float("inf"), highest + tl.log(tl.maximum(total, 1.0)))


@triton.jit
def _gradients(
    index_q, index_k, weights, biases, list_keys, list_words, counts, scale, tau, first, length, num_keys, capacity,
    logs, targets, unit, losses, dq, dk, dk_unit, dweight, dbias,
    HEADS: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, KIND: tl.constexpr,
    FAST: tl.constexpr, BLOCK: tl.constexpr, RUNS: tl.constexpr, ROUNDED: tl.constexpr,
    DIFFERENTIATES: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """What each run adds to the loss of each query and, if it DIFFERENTIATES, to the gradients."""
    tile, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    query = first + tile * 32 + tl.arange(0, 32)
    real = query < length
    row, inside, queries, weight, bias = _columns(
        index_q, weights, biases, query, batch, length, KIND, HEADS, PADDED, D, DP
    )
    channel = tl.arange(0, DP)
    own = batch * tl.num_programs(1) + tile
    step = tl.num_programs(2).to(tl.int64) * length
    log = _log_of_runs(logs, batch * length + query, step, real, RUNS)
    loss = tl.zeros((32,), tl.float32)
    of_queries = tl.zeros((PADDED * 32, DP), tl.float32)
    of_weights, of_biases = tl.zeros((PADDED * 32,), tl.float32), tl.zeros((PADDED * 32,), tl.float32)
    begin, end = run_of(counts, own, capacity, BLOCK)
    for i in range(begin, end, BLOCK):
        entry = own * capacity + i + tl.arange(0, BLOCK)
        word, selected, place, index_keys, each, logits = _block(
            entry, list_keys, list_words, index_k, queries, weight, bias, scale, tau, batch, num_keys, KIND, PADDED, D,
            DP, FAST, BLOCK,
        )  # fmt: skip
        target = tl.load(targets + entry[:, None] * 32 + tl.arange(0, 32)[None, :], mask=selected, other=0.0)
        target = target.to(tl.float32) * unit
        log_p = tl.where(selected, logits - log[None, :], 0.0)
        loss += tl.sum(target * (tl.log(tl.maximum(target, 1e-30)) - log_p), 0)
        if DIFFERENTIATES:
            of_scores = tl.where(selected, tau * (tl.exp(log_p) - target), 0.0)
            of_scores = tl.broadcast_to(tl.reshape(of_scores, (BLOCK, 1, 32)), (BLOCK, PADDED, 32))
            of_scores = tl.reshape(of_scores, (BLOCK, PADDED * 32))
            of_weights += tl.sum(of_scores * each, 0)
            slope = tl.where(each > 0, 1.0, 0.0) if KIND == 2 else each * (1 - each)
            of_products = of_scores * weight[None, :] * slope
            of_biases += tl.sum(of_products, 0)
            of_products = of_products * scale
            of_products = of_products.to(queries.dtype) if ROUNDED else of_products
            of_queries = tl.dot(tl.trans(of_products), index_keys, of_queries, input_precision="ieee")
            wanted = (word != 0)[:, None] & (channel < D)[None, :]
            add(dk, place, tl.dot(of_products, queries, input_precision="ieee"), wanted, dk_unit, FIXED)
    run = tl.program_id(0)
    tl.store(losses + run * step + batch * length + query, loss, mask=real)
    if DIFFERENTIATES:
        row += run * step * HEADS
        tl.store(dq + row[:, None] * D + channel, of_queries, mask=inside[:, None] & (channel < D))
        tl.store(dweight + row, of_weights, mask=inside)
        tl.store(dbias + row, of_biases, mask=inside)
