"""Marks of a selection on sm_90: every score against a bound, and those above it written down.

It computes what `kernels.scan.mark` does. A program takes 128 queries and walks past their keys: one warp copies, and
two or four groups of four warps take 64 queries each, so that one compares beside the products of another. Few scores
are marked, so a thread puts those it holds of a query into shared memory, notes in a word which are marked, reserves
room for as many in the query's list, and then takes these alone out again. To store each score under a predicate took
two thirds longer: such stores wait for one another's registers.

Floor: one product of HEADS · D per query and key on the tensor cores, and with σ one operation of the special-function
unit per head.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma

from kernels.hopper import advance, copy_tile, rows_of, unknown_zero
from kernels.hopper import takes as hopper_takes
from kernels.scan import ENTROPY, NOTHING, REACHED, VARIANCE
from kernels.scores import FORCED, RELU, SIGMOID

TILE = 128  # queries of a program
BLOCK = gl.constexpr(64)  # keys that a group of warps scores at once
WIDTH = 512  # of a query with all its heads, at most: what fits beside the keys in shared memory
SHARED = 227 * 2**10 - 33 * 2**10 - 2**10  # bytes for queries and keys: all but what `_stash` has, and barriers
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
    marked: Tensor,
    counts: Tensor,
    sums: Tensor,
    forced: tuple[int, int],
    controls: tuple[int, float, float],
    options: dict[str, int | bool],
) -> None:
    """Launch `mark` for what `kernels.best` has at hand; `forced` are local window and sink tokens."""
    q, k, weights, biases, starts, lasts = inputs
    stages = held_blocks(q.shape[2] * q.shape[3], q.shape[3])
    queries, keys = rows_of(q, TILE), rows_of(k[:, :, None], BLOCK.value)
    mark[(walks.shape[1], len(q))](
        queries, keys, weights, biases, starts, lasts, walks, bounds, marked, counts, sums, *controls, q.shape[1],
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
    queries, keys, _, barriers = memory
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


@gluon.constexpr_function
def _append_asm(group, half):
    """PTX of `_append`: the 16 values that a thread has of a query, two of each eight columns.

    Where they are of the product that makes them, it knows from its number: that takes no registers between products.
    """
    stash, block, base, room = (f"${16 * i}" for i in range(3, 7))
    lines = [
        "{ .reg .pred p, two; .reg .f32 over; .reg .b32 t, slot, mask, n, first, i, j, at, key, score, key2, score2;",
        ".reg .b32 query, column; .reg .b64 to;",
        f"mov.u32 t, %tid.x; and.b32 t, t, 127; mad.lo.u32 slot, t, 4, {stash};",
        "and.b32 query, t, 96; shr.u32 query, query, 1; bfe.u32 n, t, 2, 3; add.u32 query, query, n;",
        f"add.u32 query, query, {8 * half}; mad.lo.u32 at, query, 4, {stash};",
        f"and.b32 column, t, 3; mad.lo.u32 column, column, 2, {block};",
        "mov.b32 mask, 0; mov.b32 first, 0;",
    ]
    for i in range(8):  # the sign: 1 where a score is below the bound, 0 also for NaN
        for j, bits in ((i, "mask"), (i + 8, "first")):
            lines.append(f"sub.f32 over, ${16 + j}, $32; mov.b32 n, over; shf.l.wrap.b32 {bits}, n, {bits}, 1;")
    lines += [f"st.shared.f32 [slot + {group * 8192 + i * 512}], ${16 + i};" for i in range(16)]
    lines += [
        "mad.lo.u32 mask, mask, 256, first; not.b32 mask, mask; shl.b32 mask, mask, 16; popc.b32 n, mask;",
        f"atom.shared.add.u32 first, [at + {32768 + group % 2 * 256}], n; add.u32 n, n, first;",
        f"setp.gt.u32 p, n, {room}; selp.b32 mask, 0, mask, p;",  # too many: `counts` says so
        f"mad.lo.u32 first, query, {room}, first; mad.wide.u32 to, first, 8, {base};",
        "setp.eq.u32 p, mask, 0; @p bra DONE;",
        # two at a time, so that one waits beside the other
        "MORE: bfind.shiftamt.u32 i, mask; shr.u32 t, 0x80000000, i; xor.b32 mask, mask, t;",
        "setp.ne.u32 two, mask, 0; bfind.shiftamt.u32 j, mask; shr.u32 t, 0x80000000, j; not.b32 t, t;",
        "and.b32 mask, mask, t;",
        "mad.lo.u32 score, i, 512, slot; mad.lo.u32 score2, j, 512, slot;",
        f"ld.shared.b32 score, [score + {group * 8192}]; @two ld.shared.b32 score2, [score2 + {group * 8192}];",
        # the column of value i is 4·i where i is even, and the one after where it is odd
        "and.b32 n, i, 1; mad.lo.u32 key, i, 4, column; mad.lo.s32 key, n, -3, key;",
        "and.b32 n, j, 1; mad.lo.u32 key2, j, 4, column; mad.lo.s32 key2, n, -3, key2;",
        "st.global.v2.b32 [to], {key, score}; @two st.global.v2.b32 [to + 8], {key2, score2}; add.u64 to, to, 16;",
        "setp.ne.u32 p, mask, 0; @p bra MORE; DONE: }",
    ]
    return " ".join(lines)


@gluon.constexpr_function
def _append_constraints():
    return ",".join(["=r"] * 16 + ["f"] * 32 + ["r"] * 32 + ["l"] * 16 + ["r"] * 16)


@gluon.jit
def _append(scores, bound, stash, block, base, room, GROUP: gl.constexpr, HALF: gl.constexpr):
    """Write down, and count, scores [4, 8, BLOCK] whose distance from `bound` has no sign; keys begin at `block`."""
    gl.inline_asm_elementwise(
        _append_asm(GROUP, HALF),
        _append_constraints(),
        [scores, bound, stash, block, base, room],
        gl.int32,
        is_pure=False,
        pack=16,
    )


@gluon.jit
def _stash(zero):
    """The address of shared memory beside the compiler's: 8 KiB of scores for each of four groups, then 128 counts."""
    return gl.inline_asm_elementwise(
        "{ .shared .align 1024 .b8 stash[33792]; mov.u32 $0, stash; add.u32 $0, $0, $1; }",
        "=r,r", [zero], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _forget(row, stash):
    """Set the counts of queries to 0."""
    gl.inline_asm_elementwise(
        "{ .reg .b32 at; mad.lo.u32 at, $1, 4, $2; mov.b32 $0, 0; st.shared.b32 [at], $0; }",
        "=r,r,r", [row, stash], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _held(row, stash):
    """The counts of queries."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 at; mad.lo.u32 at, $1, 4, $2; ld.shared.b32 $0, [at]; }",
        "=r,r,r", [row, stash], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _halves(x):
    """x [64, BLOCK] as two tensors; of each a thread holds 16 values, all of one query."""
    return gl.split(x.reshape([4, 2, 8, BLOCK]).permute((0, 2, 3, 1)))


@gluon.jit
def _scores(
    queries, keys, gates, offsets,
    SIDE: gl.constexpr, KIND: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, RAW: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scores of 64 queries and BLOCK keys; as `kernels.scores.score_block`, FAST. Of one head, queries are at hand."""
    nothing = gl.zeros([64, BLOCK], gl.float32, LAYOUT)
    zero = unknown_zero(gl.to_tensor(0))
    right = keys.permute((1, 0))
    scores = nothing
    if not RAW and KIND != RELU:
        total = gates[0]
        for j in gl.static_range(1, HEADS):
            total += gates[j]
        scores += total[:, None]
    for j in gl.static_range(HEADS):
        if HEADS == 1:
            product = warpgroup_mma(queries, right, nothing, use_acc=False)
        else:
            product = warpgroup_mma(queries.index(zero + j).slice(SIDE * 64, 64), right, nothing, use_acc=False)
        if RAW:
            scores = product
        elif KIND == RELU:
            product = product * (1 / gl.sqrt(gl.to_tensor(float(D))))
            scores += gl.where(product < 0, 0.0, product) * gates[j][:, None]  # NaN stays
        else:
            scores += _tanh(product * (0.5 / gl.sqrt(gl.to_tensor(float(D)))) + offsets[j]) * gates[j][:, None]
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
    weights, biases, starts, lasts, walks, bounds, marks, counts, sums = tensors
    room, tau, threshold = scalars
    queries, keys, stash, barriers = memory
    ready_q, ready_k, empty_k, done = barriers
    num_rows, num_keys, local, sink = sizes
    tile, batch = gl.num_programs(0) - 1 - gl.program_id(0), gl.program_id(1).to(gl.int64)
    first, end, inner, outer = _walk(walks, tile, batch)
    in_side = gl.arange(0, 64, layout=ROW)
    query = tile * 128 + SIDE * 64 + in_side
    real = query < num_rows
    row = batch * num_rows + query
    bound = gl.load(bounds + row, mask=real, other=float("inf"))
    # Without one, all scores exceed it but −∞, which stands for what may not be chosen. A query that must choose that
    # has too few marks, and is searched for.
    bound = gl.where(bound == bound, bound, -FORCED)
    gates, offsets = (), ()
    half: gl.constexpr = 0.5 if KIND != RELU else 1.0  # as in `kernels.scores.of_queries`
    for j in gl.static_range(HEADS):
        gate = gl.full([64], half, gl.float32, ROW)
        offset = 0.0
        if not RAW:
            if KIND != SIGMOID:
                gate *= gl.load(weights + row * HEADS + j, mask=real, other=0.0).to(gl.float32)
            if KIND != RELU:
                offset = gl.load(biases + j).to(gl.float32) * half
        gates = gates + (gate,)
        offsets = offsets + (offset,)
    padded = gl.num_programs(0) * 128
    base = marks.to(gl.int64) + (batch * padded + tile * 128 + SIDE * 64) * room * 8
    bounds_of = _halves(bound[:, None] + gl.zeros([64, BLOCK], gl.float32, LAYOUT))
    number, a, b = gl.zeros([64], gl.float32, ROW), gl.zeros([64], gl.float32, ROW), gl.zeros([64], gl.float32, ROW)
    c = gl.full([64], -1e30, gl.float32, ROW)
    stage, phase = gl.to_tensor(PART), gl.to_tensor(0)
    start = gl.load(starts + row, mask=real, other=2147483647)
    last = gl.load(lasts + row, mask=real, other=-1)
    mbarrier.wait(ready_q, 0)
    left = queries
    if HEADS == 1:  # in registers, where several heads have no room
        left = queries.index(0).slice(SIDE * 64, 64).load(gl.DotOperandLayout(0, LAYOUT, 2))
    for i in range(first + PART * BLOCK, end, PARTS * BLOCK):
        mbarrier.wait(ready_k.index(stage), phase)
        scores = _scores(left, keys.index(stage), gates, offsets, SIDE, KIND, HEADS, D, RAW, LAYOUT)
        mbarrier.arrive(empty_k.index(stage))
        stage += PARTS
        phase = gl.where(stage >= STAGES, phase ^ 1, phase)
        stage = gl.where(stage >= STAGES, stage - STAGES, stage)
        if (i >= inner) & (i + BLOCK <= outer):
            if SUM != NOTHING:
                number, a, b, c = _sum(scores, scores, scores, number, a, b, c, tau, threshold, SUM, False)
        else:
            at = i + gl.arange(0, BLOCK, layout=COLUMN)[None, :]
            visible = (at >= start[:, None]) & (at <= last[:, None])
            forced = visible & ((at > last[:, None] - local) | (at < start[:, None] + sink))
            if SUM != NOTHING:
                number, a, b, c = _sum(scores, visible, forced, number, a, b, c, tau, threshold, SUM, True)
            scores = gl.where(forced, FORCED, gl.where(visible, scores, float("-inf")))
        values = _halves(scores)
        for j in gl.static_range(2):
            _append(values[j], bounds_of[j], stash, i, base, room, GROUP, j)
    mbarrier.arrive(done.index(SIDE))
    if PART == 0:
        mbarrier.wait(done.index(SIDE), 0)
        gl.store(counts + batch * padded + query, _held(in_side, stash + 32768 + SIDE * 256))
    if SUM == VARIANCE:
        a = b / gl.maximum(number, 1.0)
    if SUM == ENTROPY:
        a = gl.where(number > 0, gl.log(gl.maximum(a, 1e-30)) - b / gl.maximum(a, 1e-30), 0.0)
    if SUM != NOTHING:
        gl.store(sums + row, a, mask=real)


@gluon.jit
def mark(
    q, k, weights, biases, starts, lasts, walks, bounds, marks, counts, sums, room, tau, threshold, num_rows,
    num_keys, local, sink,
    KIND: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, RAW: gl.constexpr, SUM: gl.constexpr,
    STAGES: gl.constexpr, PARTS: gl.constexpr, COMPUTE: gl.constexpr, LOAD: gl.constexpr,
):  # fmt: skip
    """Marks [B, R, room] of each query and their number, counts [B, R], which exceeds `room` where they are cut.

    R is rounded up to 128 here.
    """
    OPERAND: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, D], q.dtype)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(q.dtype, [HEADS, 128, D], OPERAND)
    keys = gl.allocate_shared_memory(q.dtype, [STAGES, BLOCK, D], OPERAND)
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
    stash = _stash(gl.to_tensor(0))
    _forget(gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0])), stash + 32768)
    tensors = (weights, biases, starts, lasts, walks, bounds, marks, counts, sums)
    scalars = (room, tau, threshold)
    sizes, memory = (num_rows, num_keys, local, sink), (queries, keys, stash, (ready_q, ready_k, empty_k, done))
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
