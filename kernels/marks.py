"""Marks of a selection on sm_90: every score against a bound and a ceiling, and those between written down.

It computes what `kernels.scan.mark` does. A program takes 128 queries and walks past their keys: one warp copies, and
two or four groups of four warps take 64 queries each, so that one compares beside the products of another. Few scores
are marked, so a thread puts those it holds of a query into shared memory, notes in a word which are marked, reserves
room for as many in the query's list, and then takes these alone out again. To store each score under a predicate took
two thirds longer: such stores wait for one another's registers. Which keys reach a ceiling a thread knows of two
queries; eight of them exchange these bits until each has those of 16 queries, which are half a word.

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
SHARED = 227 * 2**10 - 33 * 2**10 - 6 * 2**10  # bytes for queries and keys: all but `_stash`, weights and barriers
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


@gluon.constexpr_function
def _stash_asm(place, values, first):
    """Four values into the stash."""
    return f"st.shared.v4.f32 [slot + {place}], {{{', '.join(f'${first + i}' for i in values)}}};"


@gluon.constexpr_function
def _write_asm(group):
    """PTX of `_write`: the 16 values that a thread has of each of two queries, two of each eight columns.

    Where they are of the product that makes them, it knows from its number: that takes no registers between products.
    Value 2b + o, of column 8b + o, has bits 16·o + 2b and the one above it in a word, and in the stash place b % 4 of
    quad 2·o + b // 4.
    """
    names = ("scale0", "shift0", "scale1", "shift1", "end", "stash", "block", "room", "num_keys", "base", "words")
    given = {name: f"${48 + 16 * i}" for i, name in enumerate(names)}
    stash, block = given["stash"], given["block"]
    counts = 32768 + group % 2 * 256
    quads = [(group * 8192 + i * 2048, [8 * (i % 2) + 2 * j + i // 2 for j in range(4)]) for i in range(4)]
    lines = [
        "{ .reg .pred p, two; .reg .f32 over; .reg .b32 t, n, id, slot, at, query, column, key, keep, x, y, i, j;",
        ".reg .b32 mask<2>, sure<2>, first<2>; .reg .b64 to;",
        f"mov.u32 id, %tid.x; and.b32 t, id, 127; mad.lo.u32 slot, t, 16, {stash};",
        "and.b32 query, t, 96; shr.u32 query, query, 1; bfe.u32 n, t, 2, 3; add.u32 query, query, n;",
        f"mad.lo.u32 at, query, 4, {stash};",
    ]
    # Below the bound the sign is 1; from the ceiling on numbers are 2 or more, NaN too, and have the bit after it.
    for half in range(2):
        lines.append("mov.b32 x, 0; mov.b32 y, 0;")
        for b in reversed(range(8)):
            for o, bits in ((0, "x"), (1, "y")):
                value = f"${16 + 16 * half + 2 * b + o}"
                lines.append(f"fma.rn.f32 over, {value}, {given[f'scale{half}']}, {given[f'shift{half}']};")
                lines.append(f"mov.b32 n, over; shf.l.wrap.b32 {bits}, n, {bits}, 2;")
        lines += [
            "mad.lo.u32 x, y, 65536, x; shr.u32 n, x, 1;",
            f"lop3.b32 sure{half}, x, n, 0x55555555, 0x20;",  # a & ~b & c
            f"lop3.b32 mask{half}, x, n, 0x55555555, 0x02;",  # ~a & ~b & c
            f"popc.b32 n, sure{half}; setp.ne.u32 p, n, 0; @p red.shared.add.u32 [at + {counts + 512 + 32 * half}], n;",
            f"popc.b32 n, mask{half}; atom.shared.add.u32 first{half}, [at + {counts + 32 * half}], n;",
        ]
        if half == 0:
            lines += [_stash_asm(*quad, 16) for quad in quads]
    # Bits of a thread's two queries beside each other; then eight threads that have the same columns exchange bits,
    # until each has those of 16 queries for two columns that are neighbours.
    lines.append("shl.b32 x, sure1, 1; or.b32 x, x, sure0;")
    # bit 16·o + 2b + h, of query 8h + r, becomes 16·o + 8h + b
    for distance, mask in ((1, 0x22222222), (2, 0x0C0C0C0C), (4, 0x00F000F0)):
        lines.append(f"shr.u32 t, x, {distance}; lop3.b32 t, t, x, {mask}, 0x28;")  # (a ^ b) & c
        lines.append(f"shl.b32 y, t, {distance}; lop3.b32 x, x, t, y, 0x96;")  # a ^ b ^ c
    # and then 16·o + 8h + r, of column 8b + o, where b is this thread's r
    for lane, distance, mask in ((16, 4, 0x0F0F0F0F), (8, 2, 0x33333333), (4, 1, 0x55555555)):
        lines.append(f"shfl.sync.bfly.b32 y, x, {lane}, 31, 0xFFFFFFFF;")
        lines.append(f"and.b32 t, id, {lane}; setp.ne.u32 p, t, 0; selp.b32 t, {32 - distance}, {distance}, p;")
        lines.append(f"shf.l.wrap.b32 y, y, y, t; selp.b32 keep, {mask ^ 0xFFFFFFFF}, {mask}, p;")
        lines.append("lop3.b32 x, x, y, keep, 0xE4;")  # (a & c) | (b & ~c)
    lines += [
        f"bfe.u32 y, id, 5, 2; bfe.u32 key, id, 2, 3; and.b32 n, id, 3; mad.lo.u32 column, n, 2, {block};",
        f"mad.lo.u32 key, key, 8, column; shr.u32 t, y, 1; mad.lo.u32 t, t, {given['num_keys']}, key;",
        f"mad.wide.u32 to, t, 4, {given['words']}; and.b32 t, y, 1; mad.wide.u32 to, t, 2, to;",
        f"setp.lt.s32 p, key, {given['end']}; and.b32 t, x, 0xFFFF; setp.ne.and.u32 p, t, 0, p;",
        f"@p st.global.u16 [to], t; add.u32 key, key, 1; setp.lt.s32 p, key, {given['end']};",
        "shr.u32 t, x, 16; setp.ne.and.u32 p, t, 0, p; @p st.global.u16 [to + 4], t;",
    ]
    for half in range(2):
        if half == 1:
            lines += [_stash_asm(*quad, 32) for quad in quads]
        lines += [
            f"popc.b32 n, mask{half}; add.u32 n, first{half}, n; setp.gt.u32 p, n, {given['room']};",
            f"selp.b32 mask{half}, 0, mask{half}, p;",  # too many: `counts` says so
            f"add.u32 n, query, {8 * half}; mad.lo.u32 n, n, {given['room']}, first{half};",
            f"mad.wide.u32 to, n, 8, {given['base']};",
            f"setp.eq.u32 p, mask{half}, 0; @p bra DONE{half};",
            # two at a time, so that one waits beside the other
            f"MORE{half}: bfind.u32 i, mask{half}; shl.b32 t, 1, i; xor.b32 mask{half}, mask{half}, t;",
            f"setp.ne.u32 two, mask{half}, 0; bfind.u32 j, mask{half}; shl.b32 t, 1, j; not.b32 t, t;",
            f"and.b32 mask{half}, mask{half}, t;",
            "and.b32 x, i, 24; mad.lo.u32 x, x, 256, slot; and.b32 n, i, 6; mad.lo.u32 x, n, 2, x;",
            "and.b32 y, j, 24; mad.lo.u32 y, y, 256, slot; and.b32 n, j, 6; mad.lo.u32 y, n, 2, y;",
            f"ld.shared.b32 x, [x + {group * 8192}]; @two ld.shared.b32 y, [y + {group * 8192}];",
            "and.b32 n, i, 14; mad.lo.u32 n, n, 4, column; shr.u32 t, i, 4; add.u32 n, n, t;",
            "and.b32 key, j, 14; mad.lo.u32 key, key, 4, column; shr.u32 t, j, 4; add.u32 key, key, t;",
            "st.global.v2.b32 [to], {n, x}; @two st.global.v2.b32 [to + 8], {key, y}; add.u64 to, to, 16;",
            f"setp.ne.u32 p, mask{half}, 0; @p bra MORE{half}; DONE{half}:",
        ]
    lines.append("}")
    return " ".join(lines)


@gluon.constexpr_function
def _write_constraints():
    return ",".join(["=r"] * 16 + ["f"] * 96 + ["r"] * 80 + ["l"] * 32)


@gluon.jit
def _write(values, scales, shifts, ends, stash, sizes, bases, GROUP: gl.constexpr):
    """Write down, and count, scores of which scale · score + shift is in [0, 2), and set the bits of those from 2 on.

    Args:
        values: [4, 8, BLOCK] of each of two halves, and so are `scales` and `shifts`.
        ends: of the first half, the key at which the walk ends, or 0 where 16 queries are none.
        stash: `_stash`.
        sizes: the block's first key; how many marks a query has room for; how many keys there are.
        bases: addresses of the 64 queries' marks and words.
    """
    block, room, num_keys = sizes
    lines = [scales[0], shifts[0], scales[1], shifts[1]]
    gl.inline_asm_elementwise(
        _write_asm(GROUP), _write_constraints(),
        [values[0], values[1]] + lines + [ends, stash, block, room, num_keys, bases[0], bases[1]],
        gl.int32, is_pure=False, pack=16,
    )  # fmt: skip


@gluon.jit
def _stash(zero):
    """The address of shared memory beside the compiler's: 8 KiB of scores for each of four groups, then for each of 128
    queries the number of its marks, and then of those of its keys that are sure."""
    return gl.inline_asm_elementwise(
        "{ .shared .align 1024 .b8 stash[33792]; mov.u32 $0, stash; add.u32 $0, $0, $1; }",
        "=r,r", [zero], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _forget(row, stash):
    """Set the counts of queries to 0."""
    gl.inline_asm_elementwise(
        "{ .reg .b32 at; mad.lo.u32 at, $1, 4, $2; mov.b32 $0, 0; st.shared.b32 [at], $0; "
        "st.shared.b32 [at + 512], $0; }",
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
def _gate(gates, j, SIDE: gl.constexpr, HEADS: gl.constexpr, LAYOUT: gl.constexpr):
    """The weights [64, 1] of head `j`, or their sum over heads where it is HEADS."""
    gate = gates.index(SIDE * (HEADS + 1) + j).load(gl.SliceLayout(1, LAYOUT)) if HEADS > 1 else gates
    return gate[:, None]


@gluon.jit
def _scores(
    queries, keys, gates, offsets,
    SIDE: gl.constexpr, KIND: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, RAW: gl.constexpr,
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
        scores += _gate(gates, zero + HEADS, SIDE, HEADS, LAYOUT)
    for j in gl.static_range(HEADS):
        if HEADS == 1:
            product = warpgroup_mma(queries, right, nothing, use_acc=False)
        else:
            product = warpgroup_mma(queries.index(zero + j).slice(SIDE * 64, 64), right, nothing, use_acc=False)
        if RAW:
            scores = product
        elif KIND == RELU:
            product = product * (1 / gl.sqrt(gl.to_tensor(float(D))))
            scores += gl.where(product < 0, 0.0, product) * _gate(gates, zero + j, SIDE, HEADS, LAYOUT)  # NaN stays
        else:
            sigmoid = _tanh(product * (0.5 / gl.sqrt(gl.to_tensor(float(D)))) + offsets[j])
            scores += sigmoid * _gate(gates, zero + j, SIDE, HEADS, LAYOUT)
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
            held.index(SIDE * (HEADS + 1) + j).store(gate)
    if HEADS > 1:
        held.index(SIDE * (HEADS + 1) + HEADS).store(total)
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
        scores = _scores(left, keys.index(stage), gates, offsets, SIDE, KIND, HEADS, D, RAW, LAYOUT)
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
        _write(values, scales, shifts, ends[0], stash, (i, room, num_keys), (base, word_base), GROUP)
    mbarrier.arrive(done.index(SIDE))
    if PART == 0:
        mbarrier.wait(done.index(SIDE), 0)
        gl.store(counts + batch * padded + query, _held(in_side, stash + 32768 + SIDE * 256))
        gl.store(sures + batch * padded + query, _held(in_side, stash + 33280 + SIDE * 256))
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
    held = gl.allocate_shared_memory(gl.float32, [2 * (HEADS + 1), 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
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
