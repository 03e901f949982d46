"""Marks of a selection on sm_90: every score against a bound and a ceiling, and those between written down.

It computes what `kernels.scan.mark` does. A program takes 128 queries and walks past their keys: one warp copies, and
two or four groups of four warps take 64 queries each, so that one compares beside the products of another. What is
marked, and what is chosen for sure, `kernels.marks_written` writes down.

Floor: one product of HEADS · D per query and key on the tensor cores, and with σ one operation of the special-function
unit per head.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma

from kernels.hopper import advance, copy_tile, rows_of, unknown_zero
from kernels.hopper import takes as hopper_takes
from kernels.marks_written import BLOCK, counts_held, forget_counts, stash_address, write_block
from kernels.scan import ENTROPY, NOTHING, REACHED, VARIANCE
from kernels.scores import FORCED, RELU, SIGMOID

TILE = 128  # queries of a program
WIDTH = 512  # of a query with all its heads, at most: what fits beside the keys in shared memory
SHARED = 227 * 2**10 - 33 * 2**10 - 10 * 2**10  # bytes for queries and keys: all but the stash, weights and barriers
# As it was fastest on an H100: groups of warps that share a walk's blocks between them, and registers as in
# `kernels.hopper`. Sums want more registers, and one group to see all keys.
PLAIN = {"PARTS": 2, "COMPUTE": 112, "LOAD": 32, "num_warps": 4, "maxnreg": 96}
SUMMING = {"PARTS": 1, "COMPUTE": 240, "LOAD": 24, "num_warps": 4, "maxnreg": 168}


def takes(q: Tensor, k: Tensor) -> bool:
    """Whether `mark` is for indexer queries [B, R, H, d] and keys [B, S, d]."""
    return q.dtype == k.dtype and q.shape[2] * q.shape[3] <= WIDTH and hopper_takes(q, k)


def held_blocks(width: int, size: int) -> int:
    """How many blocks of keys there is room for beside queries so wide: 8 at most, and an even number."""
    blocks: int = (SHARED - 2 * TILE * width) // (2 * BLOCK.value * size)
    return min(blocks // 2 * 2, 8)


def mark_tiles(
    inputs: tuple[Tensor, ...],
    walks: Tensor,
    bounds: Tensor,
    ceilings: Tensor,
    written: tuple[Tensor, int, Tensor, Tensor, Tensor, Tensor],
    forced: tuple[int, int],
    controls: tuple[int, float, float],
    options: dict[str, int | bool],
) -> None:
    """Launch `mark` for what `kernels.enclose` has at hand.

    Args:
        inputs: of scores.
        walks: of tiles.
        bounds: see `kernels.scan`, and so are `ceilings`.
        written: words and the stride of their rows; marks, counts, sures and sums.
        forced: local window and sink tokens.
        controls: room, tau and threshold.
        options: how `mark` is launched.
    """
    q, k, weights, biases, starts, lasts = inputs
    stages = held_blocks(q.shape[2] * q.shape[3], q.shape[3])
    queries, keys = rows_of(q, TILE), rows_of(k[:, :, None], BLOCK.value)
    mark[(walks.shape[1], len(q))](
        queries, keys, weights, biases, starts, lasts, walks, bounds, ceilings, *written, *controls, q.shape[1],
        k.shape[1], *forced, STAGES=stages, **options,
    )  # fmt: skip


@gluon.jit
def _walk(walks, tile, batch):
    """Where a tile's walk begins and ends, and between which keys its queries may choose all and must choose none."""
    at = walks + (batch * gl.num_programs(0) + tile) * 4
    return gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3)


@gluon.jit
def _load(
    q, k, walks, sizes, memory, HEADS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    queries, keys, _, _, barriers = memory
    ready_q, ready_k, empty_k, _ = barriers
    num_rows, num_keys, local, sink = sizes
    tile, batch = gl.num_programs(0) - 1 - gl.program_id(0), gl.program_id(1)
    first, end, _, _ = _walk(walks, tile, batch)
    mbarrier.expect(ready_q, HEADS * q.block_type.nbytes)
    for j in gl.static_range(HEADS):
        copy_tile(q, [batch * num_rows + tile * 128, j * q.block_type.shape[1]], ready_q, queries.index(j))
    stage, phase = gl.to_tensor(0), gl.to_tensor(1)
    for i in range(first, end, BLOCK):
        mbarrier.wait(empty_k.index(stage), phase)
        mbarrier.expect(ready_k.index(stage), k.block_type.nbytes)
        copy_tile(k, [batch * num_keys + i, 0], ready_k.index(stage), keys.index(stage))
        stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def _tanh(x):
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1)


@gluon.jit
def _line(bounds, ceilings, real):
    """Scale and shift that take a query's bound to 0 and its ceiling to 2, or close to that.

    Without a bound all scores exceed it but −∞, which stands for what may not be chosen. A query that must choose that
    has too few marks, and is searched for.
    """
    bound = gl.load(bounds, mask=real, other=0.0)
    ceiling = gl.load(ceilings, mask=real, other=float("inf"))
    all_of_them, some = ceiling == float("-inf"), bound == bound
    # Rounding takes the bound up by no more than this takes it down: equal scores are often the ones just above it.
    bound = gl.where(some, bound - gl.abs(bound) * 2.4e-7, 0.0)
    scale = gl.minimum(2 / (ceiling - bound), 1e30)
    scale = gl.where((ceiling < float("inf")) & (ceiling > bound), scale, 7.9e-31)  # else nothing usual reaches 2
    shift = gl.where(all_of_them, 1e30, -bound * scale)
    scale = gl.where(some | all_of_them, scale, 1.2e-38)
    shift = gl.where(some | all_of_them, shift, 1.0)
    return scale, gl.where(real, shift, float("-inf"))


@gluon.jit
def _halves(x):
    """x [64, BLOCK] as two tensors; of each a thread holds 16 values, all of one query."""
    return gl.split(x.reshape([4, 2, 8, BLOCK]).permute((0, 2, 3, 1)))


@gluon.jit
def _gate(gates, j, GROUP: gl.constexpr, HEADS: gl.constexpr, LAYOUT: gl.constexpr):
    """The weights [64, 1] of head `j`, or their sum over heads where it is HEADS."""
    gate = gates.index(GROUP * (HEADS + 1) + j).load(gl.SliceLayout(1, LAYOUT)) if HEADS > 1 else gates
    return gate[:, None]


@gluon.jit
def _scores(
    queries, keys, gates, offsets,
    GROUP: gl.constexpr, KIND: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, RAW: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scores of 64 queries and BLOCK keys; as `kernels.scores.score_block`, FAST.

    Of one head, queries and gates are in registers; of several, in shared memory.
    """
    nothing = gl.zeros([64, BLOCK], gl.float32, LAYOUT)
    zero = unknown_zero(gl.to_tensor(0))
    right = keys.permute((1, 0))
    scores = nothing
    if not RAW and KIND != RELU:
        scores += _gate(gates, zero + HEADS, GROUP, HEADS, LAYOUT)
    for j in gl.static_range(HEADS):
        if HEADS == 1:
            product = warpgroup_mma(queries, right, nothing, use_acc=False)
        else:
            product = warpgroup_mma(queries.index(zero + j).slice(GROUP % 2 * 64, 64), right, nothing, use_acc=False)
        if RAW:
            scores = product
        elif KIND == RELU:
            product = product * (1 / gl.sqrt(gl.to_tensor(float(D))))
            scores += gl.where(product < 0, 0.0, product) * _gate(gates, zero + j, GROUP, HEADS, LAYOUT)  # NaN stays
        else:
            sigmoid = _tanh(product * (0.5 / gl.sqrt(gl.to_tensor(float(D)))) + offsets[j])
            scores += sigmoid * _gate(gates, zero + j, GROUP, HEADS, LAYOUT)
    if RAW and KIND == RELU:
        scores = gl.where(scores < 0, 0.0, scores)
    return scores


@gluon.jit
def _sum(scores, visible, forced, number, a, b, c, tau, threshold, SUM: gl.constexpr, EDGE: gl.constexpr):
    """The sums of `kernels.scan.mark`."""
    share = gl.sum(visible.to(gl.float32), 1) if EDGE else gl.full_like(number, float(BLOCK))
    if SUM == VARIANCE:
        mean = gl.sum(gl.where(visible, scores, 0.0) if EDGE else scores, 1) / gl.maximum(share, 1.0)
        deviation = scores - mean[:, None]
        deviation = gl.where(visible, deviation, 0.0) if EDGE else deviation
        both = gl.maximum(number + share, 1.0)
        b += gl.sum(deviation * deviation, 1) + (mean - a) * (mean - a) * number * share / both
        a += (mean - a) * share / both
    if SUM == ENTROPY:
        logits = tau * scores
        highest = gl.maximum(c, gl.max(gl.where(visible, logits, float("-inf")) if EDGE else logits, 1))
        shift = gl.maximum(c - highest, -1e30)
        old = a * gl.exp(shift)
        below = logits - highest[:, None]
        below = gl.where(visible, below, 0.0) if EDGE else below
        p = gl.where(visible, gl.exp(below), 0.0) if EDGE else gl.exp(below)
        b = b * gl.exp(shift) + old * shift + gl.sum(p * below, 1)
        a = old + gl.sum(p, 1)
        c = highest
    if SUM == REACHED:
        reached = scores >= threshold
        reached = (reached & visible) | forced if EDGE else reached
        a += gl.sum(reached.to(gl.float32), 1)
    return number + share, a, b, c


@gluon.jit
def _compute(
    tensors, sizes, scalars, memory,
    GROUP: gl.constexpr, KIND: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, RAW: gl.constexpr,
    SUM: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    SIDE: gl.constexpr = GROUP % 2
    PART: gl.constexpr = GROUP // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    COLUMN: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    weights, biases, starts, lasts, walks, bounds, ceilings, words, word_stride, marks, counts, sures, sums = tensors
    room, tau, threshold = scalars
    queries, keys, held, stash, barriers = memory
    ready_q, ready_k, empty_k, done = barriers
    num_rows, num_keys, local, sink = sizes
    tile, batch = gl.num_programs(0) - 1 - gl.program_id(0), gl.program_id(1).to(gl.int64)
    first, end, inner, outer = _walk(walks, tile, batch)
    in_side = gl.arange(0, 64, layout=ROW)
    query = (tile * 2 + SIDE) * 64 + in_side
    real = query < num_rows
    row = batch * num_rows + query
    scale, shift = _line(bounds + row, ceilings + row, real)
    gates, offsets, total = held, (), gl.zeros([64], gl.float32, ROW)
    half: gl.constexpr = 0.5 if KIND != RELU else 1.0  # as in `kernels.scores.of_queries`
    for j in gl.static_range(HEADS):
        gate = gl.full([64], half, gl.float32, ROW)
        offset = 0.0
        if not RAW:
            if KIND != SIGMOID:
                gate *= gl.load(weights + row * HEADS + j, mask=real, other=0.0).to(gl.float32)
            if KIND != RELU:
                offset = gl.load(biases + j).to(gl.float32) * half
        total += gate
        offsets = offsets + (offset,)
        if HEADS > 1:
            held.index(GROUP * (HEADS + 1) + j).store(gate)
    if HEADS > 1:
        held.index(GROUP * (HEADS + 1) + HEADS).store(total)
    else:
        gates = total
    padded = gl.num_programs(0) * 128
    base = marks.to(gl.int64) + (batch * padded + (tile * 2 + SIDE) * 64) * room * 8
    word_base = words.to(gl.int64) + (batch * word_stride + (tile * 2 + SIDE).to(gl.int64) * 2 * num_keys) * 4
    end_of = gl.where(query // 16 * 16 < num_rows, end, 0)
    ends = _halves(end_of[:, None] + gl.zeros([64, BLOCK], gl.int32, LAYOUT))
    scales = _halves(scale[:, None] + gl.zeros([64, BLOCK], gl.float32, LAYOUT))
    shifts = _halves(shift[:, None] + gl.zeros([64, BLOCK], gl.float32, LAYOUT))
    number, a, b = gl.zeros([64], gl.float32, ROW), gl.zeros([64], gl.float32, ROW), gl.zeros([64], gl.float32, ROW)
    c = gl.full([64], -1e30, gl.float32, ROW)
    stage, phase = gl.to_tensor(PART), gl.to_tensor(0)
    mbarrier.wait(ready_q, 0)
    left = queries
    if HEADS == 1:  # in registers, where several heads have no room
        left = queries.index(0).slice(SIDE * 64, 64).load(gl.DotOperandLayout(0, LAYOUT, 2))
    for i in range(first + PART * BLOCK, end, PARTS * BLOCK):
        mbarrier.wait(ready_k.index(stage), phase)
        scores = _scores(left, keys.index(stage), gates, offsets, GROUP, KIND, HEADS, D, RAW, LAYOUT)
        mbarrier.arrive(empty_k.index(stage))
        stage += PARTS
        phase = gl.where(stage >= STAGES, phase ^ 1, phase)
        stage = gl.where(stage >= STAGES, stage - STAGES, stage)
        if (i >= inner) & (i + BLOCK <= outer):
            if SUM != NOTHING:
                number, a, b, c = _sum(scores, scores, scores, number, a, b, c, tau, threshold, SUM, False)
        else:
            # at the edges only, so as to take no registers between them
            at_edge = unknown_zero(i) + (tile * 2 + SIDE) * 64 + in_side
            there = at_edge < num_rows
            start = gl.load(starts + batch * num_rows + at_edge, mask=there, other=2147483647)
            last = gl.load(lasts + batch * num_rows + at_edge, mask=there, other=-1)
            at = i + gl.arange(0, BLOCK, layout=COLUMN)[None, :]
            visible = (at >= start[:, None]) & (at <= last[:, None])
            forced = visible & ((at > last[:, None] - local) | (at < start[:, None] + sink))
            if SUM != NOTHING:
                number, a, b, c = _sum(scores, visible, forced, number, a, b, c, tau, threshold, SUM, True)
            scores = gl.where(forced, FORCED, gl.where(visible, scores, float("-inf")))
        values = _halves(scores)
        write_block(values, scales, shifts, ends[0], stash, (i, room, num_keys), (base, word_base), GROUP)
    mbarrier.arrive(done.index(SIDE))
    if PART == 0:
        mbarrier.wait(done.index(SIDE), 0)
        gl.store(counts + batch * padded + query, counts_held(in_side, stash + 32768 + SIDE * 256))
        gl.store(sures + batch * padded + query, counts_held(in_side, stash + 33280 + SIDE * 256))
    if SUM == VARIANCE:
        a = b / gl.maximum(number, 1.0)
    if SUM == ENTROPY:
        a = gl.where(number > 0, gl.log(gl.maximum(a, 1e-30)) - b / gl.maximum(a, 1e-30), 0.0)
    if SUM != NOTHING:
        gl.store(sums + row, a, mask=real)


@gluon.jit
def mark(
    q, k, weights, biases, starts, lasts, walks, bounds, ceilings, words, word_stride, marks, counts, sures, sums,
    room, tau, threshold, num_rows, num_keys, local, sink,
    KIND: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, RAW: gl.constexpr, SUM: gl.constexpr,
    STAGES: gl.constexpr, PARTS: gl.constexpr, COMPUTE: gl.constexpr, LOAD: gl.constexpr,
):  # fmt: skip
    """Marks [B, R, room] of each query and their number, counts [B, R], which exceeds `room` where they are cut; in
    `words`, which are 0 before, the bits of keys that reach its ceiling, and their number, sures [B, R].

    R is rounded up to 128 here.
    """
    OPERAND: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, D], q.dtype)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(q.dtype, [HEADS, 128, D], OPERAND)
    keys = gl.allocate_shared_memory(q.dtype, [STAGES, BLOCK, D], OPERAND)
    held = gl.allocate_shared_memory(gl.float32, [2 * PARTS * (HEADS + 1), 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready_q = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    ready_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    done = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    mbarrier.init(ready_q, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready_k.index(i), count=1)
        mbarrier.init(empty_k.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(done.index(i), count=PARTS)
    fence_async_shared()
    stash = stash_address(gl.to_tensor(0))
    forget_counts(gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0])), stash + 32768)
    tensors = (weights, biases, starts, lasts, walks, bounds, ceilings, words, word_stride, marks, counts, sures, sums)
    scalars = (room, tau, threshold)
    sizes, memory = (num_rows, num_keys, local, sink), (queries, keys, held, stash, (ready_q, ready_k, empty_k, done))
    if PARTS == 1:
        gl.warp_specialize(
            [
                (_compute, (tensors, sizes, scalars, memory, 0, KIND, HEADS, D, RAW, SUM, STAGES, PARTS)),
                (_compute, (tensors, sizes, scalars, memory, 1, KIND, HEADS, D, RAW, SUM, STAGES, PARTS)),
                (_load, (q, k, walks, sizes, memory, HEADS, STAGES)),
            ],
            [4, 1],
            [COMPUTE, LOAD],
        )
    else:
        gl.warp_specialize(
            [
                (_compute, (tensors, sizes, scalars, memory, 0, KIND, HEADS, D, RAW, SUM, STAGES, PARTS)),
                (_compute, (tensors, sizes, scalars, memory, 1, KIND, HEADS, D, RAW, SUM, STAGES, PARTS)),
                (_compute, (tensors, sizes, scalars, memory, 2, KIND, HEADS, D, RAW, SUM, STAGES, PARTS)),
                (_compute, (tensors, sizes, scalars, memory, 3, KIND, HEADS, D, RAW, SUM, STAGES, PARTS)),
                (_load, (q, k, walks, sizes, memory, HEADS, STAGES)),
            ],
            [4, 4, 4, 1],
            [COMPUTE, COMPUTE, COMPUTE, LOAD],
        )
