"""The indexer's loss where every visible key is selected, on sm_90: what its warm-up spends its time on.

It computes what `kernels.divergence` does in its forward. A program takes 128 queries and a run of keys, 128 at a
time: the attention of a block is made anew head after head, in registers, by two groups of warps of which one takes
products while the other takes exponentials, beside a warp that loads (as in `kernels.hopper`). Then come the indexer's
heads, in the same rings, and the block's sums.

Floor: 2·d operations and one exponential per head, query and key: half the products of attention, all of its
exponentials.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma

from kernels.hopper import advance, chosen, copy_tile, rows_of
from kernels.hopper import takes as hopper_takes
from kernels.rule import Scores
from kernels.scores import KINDS
from kernels.support import cdiv

TILE = 128  # queries, and keys of a block
RUN = 16  # blocks of one program
SIGMOID, RELU = gl.constexpr(KINDS["sigmoid"]), gl.constexpr(KINDS["relu"])
LAUNCH = {"STAGES": 3, "COMPUTE": 240, "LOAD": 24, "num_warps": 4, "maxnreg": 168}  # as in `kernels.hopper`


def takes(q: Tensor, k: Tensor, scores: Scores, most: int) -> bool:
    """Whether `divergences` is for these: tensors of one type that Gluon takes, and all keys may be selected."""
    loaded = (q, k, scores.q, scores.k)
    return most >= k.shape[1] and all(x.dtype == q.dtype for x in loaded) and hopper_takes(*loaded)


def divergences(q: Tensor, k: Tensor, lse: Tensor, words: Tensor, scores: Scores, kind: str, tau: float) -> Tensor:
    """The divergence of each query [B, T] (`kernels.divergence.divergence`)."""
    sums = _sums(q, k, lse, words, scores, kind, tau)
    log, (negative_entropy, expected, mass) = sums[3].logsumexp(0), sums[:3].sum(1).unbind()
    return negative_entropy - expected + mass * log.masked_fill(log == -math.inf, 0)


def _sums(q: Tensor, k: Tensor, lse: Tensor, words: Tensor, scores: Scores, kind: str, tau: float) -> Tensor:
    """Σ p log p, Σ p · logit, Σ p of the attention and log Σ exp(logit) of each run of keys and query, [4, N, B, T]."""
    batch, length, heads, size = q.shape
    num_keys, (index_heads, index_size) = k.shape[1], scores.q.shape[2:]
    blocks = cdiv(num_keys, TILE)
    tiles, runs = cdiv(length, TILE), cdiv(blocks, RUN)
    busy = torch.empty(batch, tiles, blocks, dtype=torch.int32, device=q.device)
    sums = torch.empty(4, runs, batch, length, dtype=torch.float32, device=q.device)
    if sums.numel():
        _busy[(tiles, blocks, batch)](words, busy, words.shape[1], num_keys)
        none = torch.empty(0, dtype=torch.float32, device=q.device)
        weight = none if scores.weight is None else scores.weight.contiguous()
        bias = none if scores.bias is None else scores.bias.contiguous()
        scales = (1 / (math.sqrt(size) * math.log(2)), 1 / math.sqrt(index_size), tau)
        # All runs of a tile together: they read its queries, a MiB of 32 heads, from the L2 cache. Else these come from
        # memory for every block of keys, at its full bandwidth, which takes 40 % longer.
        _divergence[(runs, tiles, batch)](
            rows_of(q, TILE), rows_of(k, TILE), lse.contiguous(), words, busy, rows_of(scores.q, TILE),
            rows_of(scores.k[:, :, None], TILE), weight, bias, *sums, *scales, length, num_keys, words.shape[1], blocks,
            HEADS=heads, KV_HEADS=k.shape[2], D=size, KIND=KINDS[kind], INDEX_HEADS=index_heads, INDEX_D=index_size,
            RUN=RUN, **LAUNCH,
        )  # fmt: skip
    return sums


@triton.jit
def _busy(words, busy, num_words, num_keys):
    """Which blocks of keys hold any that a tile's queries select: busy [B, tiles, blocks]."""
    tile, block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, key = tile * 4 + tl.arange(0, 4), block * 128 + tl.arange(0, 128)
    place = (batch * num_words + row)[:, None] * num_keys + key
    found = tl.load(words + place, mask=(row < num_words)[:, None] & (key < num_keys)[None, :], other=0) != 0
    any_ = tl.max(tl.max(found.to(tl.int32), 1), 0)
    tl.store(busy + (batch * tl.num_programs(0) + tile) * tl.num_programs(1) + block, any_)


@gluon.jit
def _slot(ring, stage, ROW: gl.constexpr, TYPE: gl.constexpr):
    """A slot of a ring as rows of ROW channels."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, ROW], TYPE)
    slot = ring.index(stage)
    if slot.shape[1] != ROW:
        slot = slot._reinterpret(TYPE, [128, ROW], LAYOUT)
    return slot


@gluon.jit
def _put(tensor, row, column, slot, barrier):
    """Start to copy 128 rows of a tensor into a slot; `barrier` says when they are there."""
    mbarrier.expect(barrier, tensor.block_type.nbytes)
    copy_tile(tensor, [row, column], barrier, slot)


@gluon.jit
def _load(
    q, k, index_q, index_k, busy, sizes, rings, barriers,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr, INDEX_HEADS: gl.constexpr, INDEX_D: gl.constexpr,
    STAGES: gl.constexpr, RUN: gl.constexpr,
):  # fmt: skip
    TYPE: gl.constexpr = q.dtype
    GROUP: gl.constexpr = HEADS // KV_HEADS
    queries, keys = rings
    ready_q, empty_q, ready_k, empty_k, _ = barriers
    length, num_keys, _, blocks = sizes
    tile, batch = gl.program_id(1), gl.program_id(2)
    # rows of the next sequence may come along behind the last: what is made of them is never looked at
    query, begin = batch * length + tile * 128, gl.program_id(0) * RUN
    stage, phase, k_stage, k_phase = gl.to_tensor(0), gl.to_tensor(1), gl.to_tensor(0), gl.to_tensor(1)
    for block in range(begin, gl.minimum(begin + RUN, blocks)):
        if gl.load(busy + (batch.to(gl.int64) * gl.num_programs(1) + tile) * blocks + block) != 0:
            key = batch * num_keys + block * 128
            for kv_head in range(KV_HEADS):
                mbarrier.wait(empty_k.index(k_stage), k_phase)
                _put(k, key, kv_head * D, _slot(keys, k_stage, D, TYPE), ready_k.index(k_stage))
                k_stage, k_phase = advance(k_stage, k_phase, 2)
                for in_group in range(GROUP):
                    mbarrier.wait(empty_q.index(stage), phase)
                    column = (kv_head * GROUP + in_group) * D
                    _put(q, query, column, _slot(queries, stage, D, TYPE), ready_q.index(stage))
                    stage, phase = advance(stage, phase, STAGES)
            mbarrier.wait(empty_k.index(k_stage), k_phase)
            _put(index_k, key, 0, _slot(keys, k_stage, INDEX_D, TYPE), ready_k.index(k_stage))
            k_stage, k_phase = advance(k_stage, k_phase, 2)
            for head in range(INDEX_HEADS):
                mbarrier.wait(empty_q.index(stage), phase)
                _put(index_q, query, head * INDEX_D, _slot(queries, stage, INDEX_D, TYPE), ready_q.index(stage))
                stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def _sigmoid(x):
    half = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], gl.float32, is_pure=True, pack=1)
    return 0.5 + 0.5 * half


@gluon.jit
def _log2(x):
    """log₂ by one operation of the special-function unit: off by no more than 2⁻²² of what `gl.log2` gives."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1)


@gluon.jit
def _compute(
    lse, words, busy, weights, biases, negative_entropy, expected, mass, logs, scale, index_scale, tau, sizes, rings,
    barriers,
    SIDE: gl.constexpr, TYPE: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr,
    KIND: gl.constexpr, INDEX_HEADS: gl.constexpr, INDEX_D: gl.constexpr, STAGES: gl.constexpr, RUN: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    GROUP: gl.constexpr = HEADS // KV_HEADS
    queries, keys = rings
    ready_q, empty_q, ready_k, empty_k, turns = barriers
    length, num_keys, num_words, blocks = sizes
    tile, batch = gl.program_id(1), gl.program_id(2).to(gl.int64)
    query = tile * 128 + SIDE * 64 + gl.arange(0, 64, layout=ROW)
    real = query < length
    row = batch * length + gl.minimum(query, length - 1)
    nothing = gl.zeros([64, 128], gl.float32, LAYOUT)
    entropy, match = gl.zeros([64], gl.float32, ROW), gl.zeros([64], gl.float32, ROW)
    whole, total = gl.zeros([64], gl.float32, ROW), gl.zeros([64], gl.float32, ROW)
    highest = gl.full([64], -1e30, gl.float32, ROW)
    # its 64 queries are two words
    word_row = tile * 4 + SIDE * 2
    words_at = words + (batch * num_words + word_row) * num_keys
    bit = gl.where(real, gl.full([64], 1, gl.int32, ROW) << (query % 32), 0)
    lower_bit, upper_bit = gl.where(query % 64 < 32, bit, 0), gl.where(query % 64 < 32, 0, bit)
    begin = gl.program_id(0) * RUN
    stage, phase, k_stage, k_phase = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    turn = gl.to_tensor(1 - SIDE)  # the first group begins
    for block in range(begin, gl.minimum(begin + RUN, blocks)):
        if gl.load(busy + (batch * gl.num_programs(1) + tile) * blocks + block) != 0:
            target = nothing
            for kv_head in range(KV_HEADS):
                mbarrier.wait(ready_k.index(k_stage), k_phase)
                for in_group in range(GROUP):
                    log = gl.load(lse + row * HEADS + kv_head * GROUP + in_group) * 1.4426950408889634
                    log = gl.where(log == float("-inf"), float("inf"), log)  # where nothing is selected
                    mbarrier.wait(ready_q.index(stage), phase)
                    mine = _slot(queries, stage, D, TYPE).slice(SIDE * 64, 64)
                    mbarrier.wait(turns.index(SIDE), turn)
                    logits = warpgroup_mma(mine, _slot(keys, k_stage, D, TYPE).permute((1, 0)), nothing, use_acc=False)
                    mbarrier.arrive(turns.index(1 - SIDE))
                    turn ^= 1
                    mbarrier.arrive(empty_q.index(stage))
                    stage, phase = advance(stage, phase, STAGES)
                    target += gl.exp2(logits * scale - log[:, None])
                mbarrier.arrive(empty_k.index(k_stage))
                k_stage, k_phase = advance(k_stage, k_phase, 2)
            scores = nothing
            mbarrier.wait(ready_k.index(k_stage), k_phase)
            for head in range(INDEX_HEADS):
                mbarrier.wait(ready_q.index(stage), phase)
                mine = _slot(queries, stage, INDEX_D, TYPE).slice(SIDE * 64, 64)
                index_keys = _slot(keys, k_stage, INDEX_D, TYPE).permute((1, 0))
                mbarrier.wait(turns.index(SIDE), turn)
                each = warpgroup_mma(mine, index_keys, nothing, use_acc=False) * index_scale
                mbarrier.arrive(turns.index(1 - SIDE))
                turn ^= 1
                mbarrier.arrive(empty_q.index(stage))
                stage, phase = advance(stage, phase, STAGES)
                if KIND == RELU:
                    each = gl.where(each < 0, 0.0, each)
                else:
                    each = _sigmoid(each + gl.load(biases + head).to(gl.float32))
                if KIND != SIGMOID:
                    each *= gl.load(weights + row * INDEX_HEADS + head).to(gl.float32)[:, None]
                scores += each
            mbarrier.arrive(empty_k.index(k_stage))
            k_stage, k_phase = advance(k_stage, k_phase, 2)
            key = block * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, LAYOUT))
            lower = gl.load(words_at + key, mask=(key < num_keys) & (word_row < num_words), other=0)
            upper = gl.load(words_at + num_keys + key, mask=(key < num_keys) & (word_row + 1 < num_words), other=0)
            word = (lower[None, :] & lower_bit[:, None]) | (upper[None, :] & upper_bit[:, None])
            target = chosen(target * (1 / HEADS), word, word, 0.0)
            scores = chosen(scores * (tau * 1.4426950408889634), word, word, float("-inf"))
            entropy += gl.sum(target * _log2(gl.maximum(target, 1e-30)), 1)
            match += gl.sum(target * gl.maximum(scores, -1e30), 1)
            whole += gl.sum(target, 1)
            higher = gl.maximum(highest, gl.max(scores, 1))
            total = total * gl.exp2(highest - higher) + gl.sum(gl.exp2(scores - higher[:, None]), 1)
            highest = higher
    out = (gl.program_id(0) * gl.num_programs(2) + gl.program_id(2)).to(gl.int64) * length + query
    log = gl.where(total == 0, float("-inf"), highest + gl.log2(gl.where(total == 0, 1.0, total)))
    gl.store(negative_entropy + out, entropy * 0.6931471805599453, mask=real)
    gl.store(expected + out, match * 0.6931471805599453, mask=real)
    gl.store(mass + out, whole, mask=real)
    gl.store(logs + out, log * 0.6931471805599453, mask=real)


@gluon.jit
def _divergence(
    q, k, lse, words, busy, index_q, index_k, weights, biases, negative_entropy, expected, mass, logs, scale,
    index_scale, tau, length, num_keys, num_words, blocks,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr, KIND: gl.constexpr, INDEX_HEADS: gl.constexpr,
    INDEX_D: gl.constexpr, RUN: gl.constexpr, STAGES: gl.constexpr, COMPUTE: gl.constexpr, LOAD: gl.constexpr,
):  # fmt: skip
    """Of each run of keys and query: Σ p log p, Σ p · logit, Σ p of the attention, and log Σ exp of the logits."""
    TYPE: gl.constexpr = q.dtype
    WIDTH: gl.constexpr = max(D, INDEX_D)
    OPERAND: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, WIDTH], TYPE)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(TYPE, [STAGES, 128, WIDTH], OPERAND)
    keys = gl.allocate_shared_memory(TYPE, [2, 128, WIDTH], OPERAND)
    ready_q = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty_q = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    ready_k = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    empty_k = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready_q.index(i), count=1)
        mbarrier.init(empty_q.index(i), count=2)
    # the groups take turns with products, so that one's exponentials run beside the other's products
    for i in gl.static_range(2):
        mbarrier.init(ready_k.index(i), count=1)
        mbarrier.init(empty_k.index(i), count=2)
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()
    barriers, rings = (ready_q, empty_q, ready_k, empty_k, turns), (queries, keys)
    sizes = (length, num_keys, num_words, blocks)
    gl.warp_specialize(
        [
            (_compute, (lse, words, busy, weights, biases, negative_entropy, expected, mass, logs, scale, index_scale,
                        tau, sizes, rings, barriers, 0, TYPE, HEADS, KV_HEADS, D, KIND, INDEX_HEADS, INDEX_D, STAGES,
                        RUN)),
            (_compute, (lse, words, busy, weights, biases, negative_entropy, expected, mass, logs, scale, index_scale,
                        tau, sizes, rings, barriers, 1, TYPE, HEADS, KV_HEADS, D, KIND, INDEX_HEADS, INDEX_D, STAGES,
                        RUN)),
            (_load, (q, k, index_q, index_k, busy, sizes, rings, barriers, HEADS, KV_HEADS, D, INDEX_HEADS, INDEX_D,
                     STAGES, RUN)),
        ],
        [4, 1],
        [COMPUTE, LOAD],
    )  # fmt: skip
