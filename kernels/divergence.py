"""The indexer's loss: KL from the attention, averaged over heads, to softmax(τ · indexer score), on the selected keys.

With every visible key selected it is the loss of the indexer's warm-up. A program takes a tile of 32 queries and walks
through the union of their selections, a block of keys at a time: it makes the block's attention anew from the saved
logarithms of the softmax's sums, head after head, and its scores, all indexer heads at once. No [H, T, S] tensor
exists. On sm_90 the forward of the warm-up is `kernels.dense_divergence`.

Floor: 2·d operations per head, query and key of the union, half of the attention itself.
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
from kernels.support import INTERPRET, runs_triton, tuned
from kernels.unions import causal_ends, queries_at_once, unions
from kernels.words import WORD, unpack

RUNS = 2  # programs for the list of one tile: side by side they read its queries, 8 KiB a head, from the L2 cache


def divergence_definition(
    q: Tensor, k: Tensor, lse: Tensor, words: Tensor, scores: Scores, kind: str, tau: float
) -> tuple[Tensor, Tensor]:
    """What `divergence` computes, with every attention and score at hand."""
    support = unpack(words, q.shape[1])
    target = _target_definition(q, k, lse, support)
    predicted = tau * scores_definition(scores, kind)
    sums = predicted.masked_fill(~support, -math.inf).logsumexp(-1)
    log_p = (predicted - sums[..., None]).masked_fill(~support, 0)
    return (target * (target.clamp_min(1e-30).log() - log_p)).sum(-1).float(), sums.float()


def divergence_backward_definition(
    grad: Tensor, q: Tensor, k: Tensor, lse: Tensor, words: Tensor, scores: Scores, sums: Tensor, kind: str, tau: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `divergence_backward` computes: dKL/dI = τ · (softmax(τ · I) − target), and on through the score."""
    support = unpack(words, q.shape[1])
    target = _target_definition(q, k, lse, support)
    index_q, index_k, weight, bias = (None if x is None else x.to(target.dtype) for x in scores)
    assert index_q is not None
    assert index_k is not None
    predicted = (tau * scores_definition(scores, kind) - sums[..., None]).masked_fill(~support, -math.inf).exp()
    of_scores = (grad * tau)[..., None] * (predicted - target)  # [B, T, S]
    scale = 1 / math.sqrt(index_q.shape[3])
    products = torch.einsum("btjd,bsd->btjs", index_q, index_k) * scale
    if bias is None:
        each, slope = products.relu(), (products > 0).to(products)
    else:
        each = (products + bias[:, None]).sigmoid()
        slope = each * (1 - each)
    of_products = of_scores[:, :, None] * slope * (1 if weight is None else weight[..., None])
    none = target.new_empty(0)
    return (
        (torch.einsum("btjs,bsd->btjd", of_products, index_k) * scale).to(scores.q.dtype),
        (torch.einsum("btjs,btjd->bsd", of_products, index_q) * scale).to(scores.k.dtype),
        none if scores.weight is None else torch.einsum("bts,btjs->btj", of_scores, each).to(scores.weight.dtype),
        none if scores.bias is None else of_products.sum((0, 1, 3)).to(scores.bias.dtype),
    )


def _target_definition(q: Tensor, k: Tensor, lse: Tensor, support: Tensor) -> Tensor:
    """The attention's mean over heads, [B, T, S] in fp32 or better."""
    precise = torch.promote_types(q.dtype, torch.float32)
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    logits = torch.einsum("bthd,bshd->bhts", q.to(precise), keys.to(precise)) / math.sqrt(q.shape[3])
    return (logits - lse.transpose(1, 2)[..., None]).masked_fill(~support[:, None], -math.inf).exp().mean(1)


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
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """KL(mean over heads of softmax(q·k/√d) ‖ softmax(τ · I)) on each query's selected keys.

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
        deterministic: gradients equal from run to run.

    Returns:
        The divergence of each query in nats [B, T] fp32, 0 for a query without keys; and the logarithm of Σ exp(τ · I),
        [B, T] fp32, which the gradient needs.
    """
    scores = Scores(index_q, index_k, weight, bias)
    if not runs_triton(q):
        return divergence_definition(q, k, lse, words, scores, kind, tau)
    if dense_divergence.takes(q, k, scores, most):
        return of_sums(*dense_divergence.divergence_sums(q, k, lse, words, scores, kind, tau))
    sums = torch.empty(4, RUNS, *q.shape[:2], dtype=torch.float32, device=q.device)
    launch = _Launch(q, k, lse, words, scores, most, kind, tau)
    for lists, common in launch.chunks():
        _forward[launch.grid(lists)](*common, *sums, **launch.shape)
    return of_sums(*sums)


def of_sums(negative_entropy: Tensor, expected: Tensor, mass: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence and the logarithm of Σ exp(logit), from runs of keys [N, B, T]: Σ p log p, Σ p · logit and Σ p of
    the target, and the logarithm of each run."""
    log = logs.logsumexp(0)
    return negative_entropy.sum(0) - expected.sum(0) + mass.sum(0) * log.masked_fill(log == -math.inf, 0), log


@divergence.register_fake
def _(q: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape[:2], dtype=torch.float32), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("gsa::divergence_backward", mutates_args=())
def divergence_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    words: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor,
    most: int,
    kind: str,
    tau: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `divergence` for index_q, index_k, weight and bias; empty where there is none of these."""
    scores = Scores(index_q, index_k, weight, bias)
    if not runs_triton(q):
        return divergence_backward_definition(grad, q, k, lse, words, scores, sums, kind, tau)
    batch, length, heads, size = index_q.shape
    dq = torch.empty(RUNS, *index_q.shape, dtype=torch.float32, device=q.device)
    dweight = torch.empty(RUNS, *index_q.shape[:3], dtype=torch.float32, device=q.device)
    dbias = torch.empty_like(dweight)
    largest = 2 * tau * grad.abs().amax() * index_q.float().abs().amax() / math.sqrt(size) if q.numel() else grad.sum()
    largest = largest if weight is None else largest * weight.abs().amax().clamp_min(1e-30)
    dk = Gradient(index_k, largest, length * heads, deterministic)
    launch = _Launch(q, k, lse, words, scores, most, kind, tau)
    if heads > 1 and not INTERPRET and tuned(q):
        launch.shape["BLOCK"] = 128  # a third less time than 64
    for lists, common in launch.chunks():
        _backward[launch.grid(lists)](
            *common, sums, grad.contiguous(), dq, dk.sum, dk.unit, dweight, dbias, FIXED=deterministic, **launch.shape
        )
    none = torch.empty(0, device=q.device)
    return (
        dq.sum(0).to(index_q.dtype),
        dk.result(),
        none if weight is None else dweight.sum(0).to(weight.dtype),
        none if bias is None else dbias.sum((0, 1, 2)).to(bias.dtype),
    )


@divergence_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, lse: Tensor, words: Tensor, index_q: Tensor, index_k: Tensor,
    weight: Tensor | None, bias: Tensor | None, *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    none = q.new_empty(0, dtype=torch.float32)
    likes = [none if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in (weight, bias)]
    contiguous = torch.empty_like(index_q, memory_format=torch.contiguous_format)
    return contiguous, torch.empty_like(index_k, memory_format=torch.contiguous_format), likes[0], likes[1]


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8], output[1])
    ctx.options = inputs[8:]
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad, _):
    *tensors, sums = ctx.saved_tensors
    dq, dk, dweight, dbias = divergence_backward(grad, *tensors, sums, *ctx.options)
    weight, bias = tensors[6], tensors[7]
    of_scores = (dq, dk, None if weight is None else dweight, None if bias is None else dbias)
    return None, None, None, None, *of_scores, None, None, None, None


divergence.register_autograd(_differentiate, setup_context=_save)


class _Launch:
    """What the two kernels are launched with."""

    def __init__(
        self, q: Tensor, k: Tensor, lse: Tensor, words: Tensor, scores: Scores, most: int, kind: str, tau: float
    ) -> None:
        batch, length, heads, size = q.shape
        index_heads, index_size = scores.q.shape[2:]
        none = torch.empty(0, dtype=torch.float32, device=q.device)
        weight, bias = scores.weight, scores.bias
        self.words, self.most, self.num_keys, self.length, self.batch = words, most, k.shape[1], length, batch
        self.tensors = (
            q.contiguous(), k.contiguous(), lse.contiguous(), scores.q.contiguous(), scores.k.contiguous(),
            none if weight is None else weight.contiguous(), none if bias is None else bias.contiguous(),
        )  # fmt: skip
        self.scalars = (1 / (math.sqrt(size) * math.log(2)), 1 / math.sqrt(index_size), tau)
        group = heads // k.shape[2]
        part = min(triton.next_power_of_2(group), 4)
        self.shape = {
            "HEADS": heads, "KV_HEADS": k.shape[2], "D": size, "PART": part, "PARTS": triton.cdiv(group, part),
            "KIND": KINDS[kind], "INDEX_HEADS": index_heads, "PADDED": triton.next_power_of_2(index_heads),
            "INDEX_D": index_size, "INDEX_P": max(triton.next_power_of_2(index_size), 16),
            "FAST": not INTERPRET, "ROUNDED": q.dtype != torch.float32, "BLOCK": 16 if INTERPRET else 64,
            "num_warps": 8, "num_stages": 3,
        }  # fmt: skip
        if not tuned(q):
            self.shape |= {"BLOCK": 32, "num_stages": 2}

    def chunks(self):
        step = queries_at_once(self.batch, self.num_keys)
        for first in range(0, self.length, step):
            part = self.words[:, first // WORD : (first + step) // WORD]
            lists = unions(part, causal_ends(part, self.length, first), WORD, min(self.most * WORD, self.num_keys))
            sizes = (first, self.length, self.num_keys, lists.keys.shape[2])
            yield lists, (*self.tensors, *lists, *self.scalars, *sizes)

    def grid(self, lists):
        return (RUNS, lists.counts.shape[1], self.batch)


@triton.jit
def _target(
    q, k, lse, key, selected, query, batch, scale, length, num_keys,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The attention's mean over heads [BLOCK keys, 32 queries]."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    channel = tl.arange(0, D)
    column = tl.arange(0, 32 * PART)
    in_tile = tl.min(query) + column // PART
    target = tl.zeros((BLOCK, 32), tl.float32)
    for step in range(KV_HEADS * PARTS):
        kv_head, in_group = step // PARTS, step % PARTS * PART + column % PART
        inside = (in_tile < length) & (in_group < GROUP)
        head_row = (batch * length + in_tile) * HEADS + kv_head * GROUP + in_group
        place = ((batch * num_keys + key) * KV_HEADS + kv_head)[:, None] * D + channel
        queries = tl.load(q + head_row[:, None] * D + channel, mask=inside[:, None], other=0.0)
        log = tl.load(lse + head_row, mask=inside, other=float("inf")) * 1.4426950408889634
        logits = tl.dot(tl.load(k + place), tl.trans(queries), input_precision="ieee") * scale
        # a column's logarithm is −inf only where nothing is selected
        p = tl.exp2(logits - tl.where(log == float("-inf"), float("inf"), log)[None, :])
        target += tl.sum(tl.reshape(p, (BLOCK, 32, PART)), 2)
    return tl.where(selected, target * (1 / HEADS), 0.0)


@triton.jit
def _columns(
    index_q, weights, biases, query, batch, length,
    KIND: tl.constexpr, INDEX_HEADS: tl.constexpr, PADDED: tl.constexpr, INDEX_D: tl.constexpr, INDEX_P: tl.constexpr,
):  # fmt: skip
    """Of each pair of indexer head and query: number, whether it is real, index query, weight and bias."""
    column = tl.arange(0, PADDED * 32)
    head, in_tile = column // 32, tl.min(query) + column % 32
    inside = (in_tile < length) & (head < INDEX_HEADS)
    row = (batch * length + in_tile) * INDEX_HEADS + head
    channel = tl.arange(0, INDEX_P)
    queries = tl.load(index_q + row[:, None] * INDEX_D + channel, mask=inside[:, None] & (channel < INDEX_D), other=0.0)
    weight = inside.to(tl.float32)
    bias = tl.zeros((PADDED * 32,), tl.float32)
    if KIND != 1:
        weight = tl.load(weights + row, mask=inside, other=0.0).to(tl.float32)
    if KIND != 2:
        bias = tl.load(biases + head, mask=inside, other=0.0).to(tl.float32)
    return row, inside, queries, weight, bias


@triton.jit
def _each(index_keys, queries, bias, scale, KIND: tl.constexpr, FAST: tl.constexpr):
    """What each indexer head makes of each pair of key and query, before its weight."""
    product = tl.dot(index_keys, tl.trans(queries), input_precision="ieee") * scale
    if KIND == 2:
        return tl.where(product < 0, 0.0, product)
    return sigmoid(product + bias[None, :], FAST)


@triton.jit
def _block(
    i, entries, q, k, lse, index_k, list_keys, list_words, queries, bias, query, batch, scale, index_scale,
    length, num_keys,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    KIND: tl.constexpr, INDEX_D: tl.constexpr, INDEX_P: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of BLOCK keys of a list: words, who selects them, the target, where their index keys are, these, and `_each`."""
    entry = entries + i + tl.arange(0, BLOCK)
    key, word = tl.load(list_keys + entry).to(tl.int64), tl.load(list_words + entry)
    selected = ((word[:, None] >> tl.arange(0, 32)[None, :]) & 1) != 0
    target = _target(
        q, k, lse, key, selected, query, batch, scale, length, num_keys, HEADS, KV_HEADS, D, PART, PARTS, BLOCK
    )  # fmt: skip
    channel = tl.arange(0, INDEX_P)
    place = (batch * num_keys + key)[:, None] * INDEX_D + channel
    index_keys = tl.load(index_k + place, mask=(channel < INDEX_D)[None, :], other=0.0)
    each = _each(index_keys, queries, bias, index_scale, KIND, FAST)
    return word, selected, target, place, index_keys, each


@triton.jit
def _run(counts, own, capacity, BLOCK: tl.constexpr):
    """Where the part of a list that is a program's begins, and how many keys it has."""
    count = tl.load(counts + own)
    length = tl.cdiv(tl.cdiv(count, BLOCK), tl.num_programs(0)) * BLOCK
    first = tl.program_id(0) * length
    return own * capacity + first, tl.minimum(count - first, length)


@triton.jit
def _forward(
    q, k, lse, index_q, index_k, weights, biases, list_keys, list_words, counts, scale, index_scale, tau,
    first, length, num_keys, capacity, negative_entropies, expectations, masses, logs,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    KIND: tl.constexpr, INDEX_HEADS: tl.constexpr, PADDED: tl.constexpr, INDEX_D: tl.constexpr, INDEX_P: tl.constexpr,
    FAST: tl.constexpr, ROUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    query = first + tile * 32 + tl.arange(0, 32)
    real = query < length
    row, inside, queries, weight, bias = _columns(
        index_q, weights, biases, query, batch, length, KIND, INDEX_HEADS, PADDED, INDEX_D, INDEX_P
    )
    own = batch * tl.num_programs(1) + tile
    negative_entropy, expected = tl.zeros((32,), tl.float32), tl.zeros((32,), tl.float32)
    mass = tl.zeros((32,), tl.float32)
    highest, total = tl.full((32,), -1e30, tl.float32), tl.zeros((32,), tl.float32)
    entries, count = _run(counts, own, capacity, BLOCK)
    for i in range(0, count, BLOCK):
        word, selected, target, place, index_keys, each = _block(
            i, entries, q, k, lse, index_k, list_keys, list_words, queries, bias, query, batch, scale,
            index_scale, length, num_keys, HEADS, KV_HEADS, D, PART, PARTS, KIND, INDEX_D, INDEX_P, FAST, BLOCK,
        )  # fmt: skip
        each *= weight[None, :]
        logits = tau * tl.sum(tl.reshape(each, (BLOCK, PADDED, 32)), 1)
        negative_entropy += tl.sum(target * tl.log(tl.maximum(target, 1e-30)), 0)
        expected += tl.sum(tl.where(selected, target * logits, 0.0), 0)
        mass += tl.sum(target, 0)
        logits = tl.where(selected, logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher[None, :]), 0)
        highest = higher
    empty = total == 0
    log = tl.where(empty, float("-inf"), highest + tl.log(tl.where(empty, 1.0, total)))
    out = (tl.program_id(0) * tl.num_programs(2) + batch) * length + query
    tl.store(negative_entropies + out, negative_entropy, mask=real)
    tl.store(expectations + out, expected, mask=real)
    tl.store(masses + out, mass, mask=real)
    tl.store(logs + out, log, mask=real)


@triton.jit
def _backward(
    q, k, lse, index_q, index_k, weights, biases, list_keys, list_words, counts, scale, index_scale, tau,
    first, length, num_keys, capacity, sums, grad, dq, dk, dk_unit, dweight, dbias,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    KIND: tl.constexpr, INDEX_HEADS: tl.constexpr, PADDED: tl.constexpr, INDEX_D: tl.constexpr, INDEX_P: tl.constexpr,
    FAST: tl.constexpr, ROUNDED: tl.constexpr, BLOCK: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    tile, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    query = first + tile * 32 + tl.arange(0, 32)
    real = query < length
    row, inside, queries, weight, bias = _columns(
        index_q, weights, biases, query, batch, length, KIND, INDEX_HEADS, PADDED, INDEX_D, INDEX_P
    )
    channel = tl.arange(0, INDEX_P)
    own = batch * tl.num_programs(1) + tile
    log = tl.load(sums + batch * length + query, mask=real, other=float("inf"))
    log = tl.where(log == float("-inf"), float("inf"), log)
    upstream = tl.load(grad + batch * length + query, mask=real, other=0.0) * tau
    of_queries = tl.zeros((PADDED * 32, INDEX_P), tl.float32)
    of_weights, of_biases = tl.zeros((PADDED * 32,), tl.float32), tl.zeros((PADDED * 32,), tl.float32)
    entries, count = _run(counts, own, capacity, BLOCK)
    for i in range(0, count, BLOCK):
        word, selected, target, place, index_keys, each = _block(
            i, entries, q, k, lse, index_k, list_keys, list_words, queries, bias, query, batch, scale,
            index_scale, length, num_keys, HEADS, KV_HEADS, D, PART, PARTS, KIND, INDEX_D, INDEX_P, FAST, BLOCK,
        )  # fmt: skip
        logits = tau * tl.sum(tl.reshape(each * weight[None, :], (BLOCK, PADDED, 32)), 1)
        predicted = tl.where(selected, tl.exp(logits - log[None, :]), 0.0)
        of_scores = upstream[None, :] * (predicted - target)  # [BLOCK, 32]
        of_scores = tl.broadcast_to(tl.reshape(of_scores, (BLOCK, 1, 32)), (BLOCK, PADDED, 32))
        of_scores = tl.reshape(of_scores, (BLOCK, PADDED * 32))
        of_weights += tl.sum(of_scores * each, 0)
        slope = tl.where(each > 0, 1.0, 0.0) if KIND == 2 else each * (1 - each)
        of_products = of_scores * weight[None, :] * slope
        of_biases += tl.sum(of_products, 0)
        of_products = of_products * index_scale
        of_products = of_products.to(queries.dtype) if ROUNDED else of_products
        of_queries = tl.dot(tl.trans(of_products), index_keys, of_queries, input_precision="ieee")
        wanted = (word != 0)[:, None] & (channel < INDEX_D)[None, :]
        add(dk, place, tl.dot(of_products, queries, input_precision="ieee"), wanted, dk_unit, FIXED)
    row += tl.program_id(0) * tl.num_programs(2) * length * INDEX_HEADS
    tl.store(dq + row[:, None] * INDEX_D + channel, of_queries, mask=inside[:, None] & (channel < INDEX_D))
    tl.store(dweight + row, of_weights, mask=inside)
    tl.store(dbias + row, of_biases, mask=inside)
