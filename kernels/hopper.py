"""Attention over unions on sm_90: warps that only load, and two groups of warps that only compute.

It computes what `kernels.attend` does, for tiles of 128 rows. Four warps gather keys and values into a ring in shared
memory. Two groups of four warps take 64 rows each, so that the softmax of one runs beside the products of the other;
within a group the products with a block's values run beside the softmax of the next block. Programs stay on their
multiprocessor, one tile after the other, so that a tile's first keys are loaded while the one before it ends.

- Floor: 4·d operations per row and key of the union. Tensor cores alone, without loads, reach 584 TFLOP/s so on an
  H100, all of it 450 to 550; cuDNN's dense attention reaches 595 on the same one.
- What is loaded is gathered by `cp.async` and read by `wgmma`; a barrier per slot of the ring says when it has arrived,
  another when both groups are done with it. No fence of proxies stands between them, as none does in CUTLASS where it
  loads so (sm90_mma_multistage_gmma_ss_warpspecialized.hpp).

Warps cannot be given roles in Triton's own language, so this is written in Gluon, which has no interpreter: what holds
of it is tested on a GPU, against `kernels.attend.attend_definition` as all else.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.support import tuned

# their names from Triton 3.9 on
copy = getattr(async_copy, "async_load", async_copy.async_copy_global_to_shared)
copy_tile = getattr(tma, "async_load", tma.async_copy_global_to_shared)

TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
ROWS = 128  # of a tile
NEAR = 2**25  # bytes of keys and values that the L2 cache holds
# As they were fastest on an H100, and together all that a multiprocessor has: registers of a thread before the warps
# take their roles and then of those that compute and that load, and bytes of shared memory for three blocks of keys.
LAUNCH = {"BLOCK": 128, "STAGES": 3, "COMPUTE": 208, "LOAD": 88, "num_warps": 4, "maxnreg": 168}


def takes(*tensors: Tensor) -> bool:
    """Whether kernels in Gluon are for these: heads of 64 or 128 in 16 bits, copied 16 bytes at a time, on sm_90."""
    return all(
        x.is_cuda and tuned(x) and x.dtype in TYPES and x.shape[-1] in (64, 128) and x.data_ptr() % 16 == 0
        for x in tensors
    )


def grid(works: int, tensor: Tensor) -> tuple[int]:
    """As many programs as there are multiprocessors, which they stay on, or pieces of work."""
    return (min(works, torch.cuda.get_device_properties(tensor.device).multi_processor_count),)


def is_far(k: Tensor) -> bool:
    """Whether keys and values [B, S, heads, d] are too many for the L2 cache."""
    return 2 * k.numel() * k.element_size() > NEAR


def rows_of(x: Tensor, rows: int) -> TensorDescriptor:
    """A tensor [B, T, heads, d] as rows of all heads, of which `copy_tile` copies so many at a time, by head."""
    block = [rows, x.shape[3]]
    layout = gl.NVMMASharedLayout.get_default_for(block, TYPES[x.dtype])
    return TensorDescriptor.from_tensor(x.contiguous().flatten(0, 1).flatten(1), block, layout)


@gluon.jit
def unknown_zero(x):
    """0, which the compiler does not know: what depends on it is not computed before a loop and kept in registers."""
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [x], gl.int32, is_pure=False, pack=1)


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The slot of the ring after `stage`, and the phase of its barriers, which changes with every turn."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def arrived(barrier):
    """Have each thread that loads say so at `barrier` once all that it has started to copy is there."""
    async_copy.mbarrier_arrive(barrier, increment_count=False)


@gluon.jit
def share_of(works):
    """How many pieces of work this program takes: every so manieth, of as many programs as there are."""
    return gl.cdiv(works + unknown_zero(works) - gl.program_id(0), gl.num_programs(0))


@gluon.jit
def dealt(nth, works):
    """Which of pieces of work, the longest of which come last, is a program's `nth`, dealt to and fro from the last on.

    In the order of their lengths some programs would have long ones only.
    """
    zero = unknown_zero(nth)
    programs, place = gl.num_programs(0) + zero, gl.program_id(0) + zero
    back = (nth % 2 == 1) & ((nth + 1) * programs <= works)
    return works - 1 - nth * programs - gl.where(back, programs - 1 - place, place)


@gluon.jit
def piece_of(nth, sizes, KV_HEADS: gl.constexpr, PARTS: gl.constexpr, FAR: gl.constexpr):
    """Of a program's `nth` piece of work: tile, head of keys and part of its group in one, and batch.

    Neighbouring tiles of one head come together where keys are FAR (`is_far`): they read much the same, which the L2
    cache then holds. Where it holds all keys, tiles are `dealt`: those of a sequence's beginning have short lists.

    With no more divisions than there must be: a piece's first product waits for what comes of them.
    """
    zero = unknown_zero(nth)  # else divisors are prepared before all loops and kept
    tiles, of_tile = sizes[4] + zero, sizes[5] + zero
    if FAR:
        number = nth * gl.num_programs(0) + gl.program_id(0)
        rest = number // tiles
        tile = number - rest * tiles
    else:
        number = dealt(nth, tiles * of_tile)
        tile = number // of_tile
        rest = number - tile * of_tile
    return tile, rest % (KV_HEADS * PARTS), rest // (KV_HEADS * PARTS)


@gluon.jit
def length_of(nth, counts, sizes, KV_HEADS: gl.constexpr, PARTS: gl.constexpr, FAR: gl.constexpr):
    """How long the list of a program's `nth` piece of work is."""
    tile, _, batch = piece_of(nth, sizes, KV_HEADS, PARTS, FAR)
    return gl.load(counts + batch * sizes[4] + tile)


@gluon.jit
def work_of(nth, counts, sizes, KV_HEADS: gl.constexpr, PARTS: gl.constexpr, FAR: gl.constexpr):
    """Of a piece of work: tile, head of keys, part of its group, batch, where its list begins and how long it is."""
    tile, head, batch = piece_of(nth, sizes, KV_HEADS, PARTS, FAR)
    count = gl.load(counts + batch * sizes[4] + tile)
    entries = (batch.to(gl.int64) * sizes[4] + tile) * sizes[3]
    return tile, head // PARTS, head % PARTS, batch.to(gl.int64), entries, count


@gluon.jit
def rows_of_tile(
    row, tile, kv_head, part, batch, sizes,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, TILE: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """Where rows of a tile are among those of all queries and heads, and which are real."""
    first, length = sizes[0], sizes[1]
    group: gl.constexpr = HEADS // KV_HEADS
    query, in_group = first + tile * TILE + row // PART, part * PART + row % PART
    return (batch * length + query) * HEADS + kv_head * group + in_group, (query < length) & (in_group < group)


@gluon.jit
def _load(
    q, k, v, list_keys, list_words, counts, sizes, rings, barriers,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr, TILE: gl.constexpr, PART: gl.constexpr,
    PARTS: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr, FAR: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])  # 16 bytes of a thread
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    entry = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, LAYOUT))
    word_entry = gl.arange(0, BLOCK, layout=gl.BlockedLayout([1], [32], [4], [0]))
    queries, keys, values, words = rings
    ready_q, empty_q, ready_k, empty_k, ready_v, empty_v = barriers
    num_keys = sizes[2]
    stage, phase, turn = gl.to_tensor(0), gl.to_tensor(1), gl.to_tensor(1)
    for nth in range(share_of(sizes[4] * sizes[5])):
        tile, kv_head, part, batch, entries, count = work_of(nth, counts, sizes, KV_HEADS, PARTS, FAR)
        kv = (batch * num_keys * KV_HEADS + kv_head) * D
        last = gl.maximum(gl.cdiv(count, BLOCK) - 1, 0) * BLOCK
        key = gl.load(list_keys + entries + entry)
        for i in range(0, count, BLOCK):
            if WIDE:
                key = key.to(gl.int64)
            place = (key * (KV_HEADS * D))[:, None] + channel
            # the next block's keys are on their way while this one waits for room
            key = gl.load(list_keys + entries + gl.minimum(i + BLOCK, last) + entry)
            mbarrier.wait(empty_k.index(stage), phase)
            copy(keys.index(stage), k + kv + place)
            copy(words.index(stage), list_words + entries + i + word_entry)
            arrived(ready_k.index(stage))
            mbarrier.wait(empty_v.index(stage), phase)
            copy(values.index(stage), v + kv + place)
            arrived(ready_v.index(stage))
            stage, phase = advance(stage, phase, STAGES)
            if i == 0:  # there is room for the first keys before there is for the queries
                mbarrier.wait(empty_q, turn)
                for side in gl.static_range(2):
                    rows = side * 64 + row + unknown_zero(i)
                    at, real = rows_of_tile(rows, tile, kv_head, part, batch, sizes, HEADS, KV_HEADS, TILE, PART)
                    at = gl.where(real, at, 0)  # any that may be read: what comes of it is not stored
                    copy(queries.index(side), q + (at * D)[:, None] + channel)
                arrived(ready_q)
                turn ^= 1


@gluon.jit
def chosen(x, word, bit, other):
    """`x` where the words have the bit, `other` elsewhere.

    With `gl.where`, LLVM collects the comparisons' outcomes bit by bit: a third more instructions in all.
    """
    word, bit = gl.broadcast(word, bit)
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; and.b32 t, $2, $3; setp.ne.b32 p, t, 0; selp.f32 $0, $1, $4, p; }",
        "=f,f,r,r,f", [x, word, bit, other], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _softmax(logits, word, bit, highest, total, scale, LEFT: gl.constexpr, TYPE: gl.constexpr):
    """A block's probabilities in the layout of a left factor; the running maximum and sum; and how far sums shrink."""
    logits = chosen(logits, word[None, :], bit[:, None], float("-inf"))
    higher = gl.maximum(highest, gl.max(logits, 1))
    p = gl.exp2(logits * scale - (higher * scale)[:, None])
    shrink = gl.exp2((highest - higher) * scale)
    return gl.convert_layout(p.to(TYPE), LEFT), higher, total * shrink + gl.sum(p, 1), shrink


@gluon.jit
def _compute(
    counts, out, lse, scale, sizes, rings, barriers,
    SIDE: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr, TILE: gl.constexpr,
    PART: gl.constexpr, PARTS: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    FAR: gl.constexpr,
):  # fmt: skip
    TYPE: gl.constexpr = out.dtype.element_ty
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    WORD: gl.constexpr = gl.SliceLayout(0, LOGITS)
    row, out_row = SIDE * 64 + gl.arange(0, 64, layout=ROW), SIDE * 64 + gl.arange(0, 64, layout=OUT_ROW)
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, OUT))[None, :]
    nothing = gl.zeros([64, BLOCK], gl.float32, LOGITS)
    queries, keys, values, words = rings
    ready_q, empty_q, ready_k, empty_k, ready_v, empty_v = barriers
    stage, phase, turn = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    works = share_of(sizes[4] * sizes[5])
    count = length_of(0, counts, sizes, KV_HEADS, PARTS, FAR)
    for nth in range(works):
        tile, kv_head, part, batch, _, _ = work_of(nth, counts, sizes, KV_HEADS, PARTS, FAR)
        bit = gl.full([64], 1, gl.int32, ROW) << (tile * TILE % 32 + row // PART)
        highest = gl.full([64], -1e30, gl.float32, ROW)  # of the logits before they are scaled
        total = gl.zeros([64], gl.float32, ROW)
        acc = gl.zeros([64, D], gl.float32, OUT)
        if count > 0:
            mbarrier.wait(ready_q, turn)
            turn ^= 1
            mbarrier.wait(ready_k.index(stage), phase)
            logits = warpgroup_mma(queries.index(SIDE), keys.index(stage).permute((1, 0)), nothing, use_acc=False)
            mbarrier.arrive(empty_q, pred=count <= BLOCK)
            word = words.index(stage).load(WORD)
            mbarrier.arrive(empty_k.index(stage))
            p, highest, total, shrink = _softmax(logits, word, bit, highest, total, scale, LEFT, TYPE)
            later, later_phase = advance(stage, phase, STAGES)
            mbarrier.wait(ready_k.index(later), later_phase, pred=count > BLOCK)
            for i in range(BLOCK, count, BLOCK):
                logits = warpgroup_mma(
                    queries.index(SIDE), keys.index(later).permute((1, 0)), nothing, use_acc=False, is_async=True
                )
                mbarrier.wait(ready_v.index(stage), phase)
                acc = warpgroup_mma(p, values.index(stage), acc, is_async=True)
                logits = warpgroup_mma_wait(1, deps=[logits])
                mbarrier.arrive(empty_q, pred=i + BLOCK >= count)
                word = words.index(later).load(WORD)
                mbarrier.arrive(empty_k.index(later))
                following, highest, total, shrink = _softmax(logits, word, bit, highest, total, scale, LEFT, TYPE)
                # This wait stands here because ptxas moves no softmax across it: it would, across the one for the
                # products, and nothing would run beside them any more.
                third, third_phase = advance(later, later_phase, STAGES)
                mbarrier.wait(ready_k.index(third), third_phase, pred=i + BLOCK < count)
                acc, p, following = warpgroup_mma_wait(0, deps=[acc, p, following])
                mbarrier.arrive(empty_v.index(stage))
                acc = acc * gl.convert_layout(shrink, OUT_ROW)[:, None]
                p, stage, phase, later, later_phase = following, later, later_phase, third, third_phase
            mbarrier.wait(ready_v.index(stage), phase)
            acc = warpgroup_mma(p, values.index(stage), acc)
            mbarrier.arrive(empty_v.index(stage))
            stage, phase = advance(stage, phase, STAGES)
        # of the next one, in good time
        count = length_of(gl.minimum(nth + 1, works - 1), counts, sizes, KV_HEADS, PARTS, FAR)
        empty = total == 0
        log = gl.where(empty, float("-inf"), (highest * scale + gl.log2(total)) * 0.6931471805599453)
        at, real = rows_of_tile(row, tile, kv_head, part, batch, sizes, HEADS, KV_HEADS, TILE, PART)
        gl.store(lse + at, log, mask=real)
        acc = acc * gl.convert_layout(1 / gl.where(empty, 1.0, total), OUT_ROW)[:, None]
        at, real = rows_of_tile(out_row, tile, kv_head, part, batch, sizes, HEADS, KV_HEADS, TILE, PART)
        gl.store(out + (at * D)[:, None] + channel, acc.to(TYPE), mask=real[:, None])


@gluon.jit
def attend_tiles(
    q, k, v, list_keys, list_words, counts, out, lse, scale, first, length, num_keys, capacity, tiles, of_tile,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr, TILE: gl.constexpr, PART: gl.constexpr,
    PARTS: gl.constexpr, WIDE: gl.constexpr, FAR: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    COMPUTE: gl.constexpr, LOAD: gl.constexpr,
):  # fmt: skip
    """As `kernels.attend._forward`; lists are padded to BLOCK, and `of_tile` is heads of keys × PARTS × batch, and
    FAR `is_far`."""
    TYPE: gl.constexpr = q.dtype.element_ty
    OPERAND: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, D], TYPE)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    rings = (
        gl.allocate_shared_memory(TYPE, [2, 64, D], OPERAND),
        gl.allocate_shared_memory(TYPE, [STAGES, BLOCK, D], OPERAND),
        gl.allocate_shared_memory(TYPE, [STAGES, BLOCK, D], OPERAND),
        gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0])),
    )
    ready_q = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    empty_q = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    ready_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    ready_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    # each of the 128 threads that load says so for itself, each of the two groups that compute once
    mbarrier.init(ready_q, count=128)
    mbarrier.init(empty_q, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready_k.index(i), count=128)
        mbarrier.init(empty_k.index(i), count=2)
        mbarrier.init(ready_v.index(i), count=128)
        mbarrier.init(empty_v.index(i), count=2)
    fence_async_shared()
    barriers = (ready_q, empty_q, ready_k, empty_k, ready_v, empty_v)
    sizes = (first, length, num_keys, capacity, tiles, of_tile)
    gl.warp_specialize(
        [
            (_compute, (counts, out, lse, scale, sizes, rings, barriers, 0, HEADS, KV_HEADS, D, TILE, PART, PARTS,
                        BLOCK, STAGES, FAR)),
            (_compute, (counts, out, lse, scale, sizes, rings, barriers, 1, HEADS, KV_HEADS, D, TILE, PART, PARTS,
                        BLOCK, STAGES, FAR)),
            (_load, (q, k, v, list_keys, list_words, counts, sizes, rings, barriers, HEADS, KV_HEADS, D, TILE, PART,
                     PARTS, BLOCK, STAGES, WIDE, FAR)),
        ],
        [4, 4],
        [COMPUTE, LOAD],
    )  # fmt: skip
