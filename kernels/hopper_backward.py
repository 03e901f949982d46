"""The gradients of attention over unions on sm_90: warps that only load, two groups that compute, warps that only add.

It computes what `kernels.attend._backward` does, for tiles of 128 rows, 64 keys at a time. Each group makes the
probabilities of its 64 rows and their gradients, and hands both over in shared memory; of all 128 rows one group then
makes what belongs to values, the other what belongs to keys. Four more warps add that to memory: it takes as long as
all products, and the groups would stand still meanwhile.

Floor: 10·d operations per row and key of the union; and 8·d bytes added to memory for each key of a tile, of which an
H100's L2 cache takes 2.9 TB/s.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.hopper import advance, arrived, chosen, copy, rows_of_tile, share_of, unknown_zero, work_of

# as in `kernels.hopper`
LAUNCH = {"BLOCK": 64, "STAGES": 2, "COMPUTE": 200, "LOAD": 56, "ADD": 56, "num_warps": 4, "maxnreg": 128}


@gluon.jit
def _load(
    q, k, v, grad, list_keys, list_words, counts, sizes, rings, barriers,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr, TILE: gl.constexpr, PART: gl.constexpr,
    PARTS: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr, FAR: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])  # 16 bytes of a thread
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    entry = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, LAYOUT))
    word_entry = gl.arange(0, BLOCK, layout=gl.BlockedLayout([1], [32], [4], [0]))
    queries, upstream, keys, values, words, _, _ = rings
    ready_q, empty_q, ready, empty = barriers
    num_keys = sizes[2]
    stage, phase, turn = gl.to_tensor(0), gl.to_tensor(1), gl.to_tensor(1)
    for nth in range(share_of(sizes[4] * sizes[5])):
        tile, kv_head, part, batch, entries, count = work_of(nth, counts, sizes, KV_HEADS, PARTS, FAR)
        mbarrier.wait(empty_q, turn)
        for side in gl.static_range(2):
            at, real = rows_of_tile(side * 64 + row, tile, kv_head, part, batch, sizes, HEADS, KV_HEADS, TILE, PART)
            of_rows = (gl.where(real, at, 0) * D)[:, None] + channel  # any that may be read: nothing comes of it
            copy(queries.index(0).slice(side * 64, 64), q + of_rows)
            copy(upstream.index(0).slice(side * 64, 64), grad + of_rows)
        arrived(ready_q)
        turn ^= 1
        kv = (batch * num_keys * KV_HEADS + kv_head) * D
        last = gl.maximum(gl.cdiv(count, BLOCK) - 1, 0) * BLOCK
        key = gl.load(list_keys + entries + entry)
        for i in range(0, count, BLOCK):
            if WIDE:
                key = key.to(gl.int64)
            place = (key * (KV_HEADS * D))[:, None] + channel
            # the next block's keys are on their way while this one waits for room
            key = gl.load(list_keys + entries + gl.minimum(i + BLOCK, last) + entry)
            mbarrier.wait(empty.index(stage), phase)
            copy(keys.index(stage), k + kv + place)
            copy(values.index(stage), v + kv + place)
            copy(words.index(stage), list_words + entries + i + word_entry)
            arrived(ready.index(stage))
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def _add(
    list_keys, counts, dk, dv, sizes, made, barriers,
    KV_HEADS: gl.constexpr, D: gl.constexpr, PARTS: gl.constexpr, BLOCK: gl.constexpr, FAR: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [128 // D, D // 4], [4, 1], [1, 0])  # whole rows of a warp
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    entry = gl.arange(0, 16, layout=gl.SliceLayout(1, LAYOUT))
    ready, empty = barriers
    phase = gl.to_tensor(0)
    for nth in range(share_of(sizes[4] * sizes[5])):
        _tile, kv_head, _part, batch, entries, count = work_of(nth, counts, sizes, KV_HEADS, PARTS, FAR)
        kv = (batch * sizes[2] * KV_HEADS + kv_head) * D
        for i in range(0, count, BLOCK):
            for side in gl.static_range(2):
                mbarrier.wait(ready.index(side), phase)
                for first in gl.static_range(0, BLOCK, 16):
                    key = gl.load(list_keys + entries + i + first + entry).to(gl.int64)
                    value = made.index(side).slice(first, 16).load(LAYOUT)
                    sums = (dv if side == 0 else dk) + kv + (key * (KV_HEADS * D))[:, None] + channel
                    gl.atomic_add(sums, value, mask=(i + first + entry < count)[:, None], sem="relaxed")
                mbarrier.arrive(empty.index(side))
            phase ^= 1


@gluon.jit
def _compute(
    counts, lse, delta, dq, scale, sizes, rings, made, barriers,
    SIDE: gl.constexpr, TYPE: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr,
    TILE: gl.constexpr, PART: gl.constexpr, PARTS: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    FAR: gl.constexpr,
):  # fmt: skip
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    row = SIDE * 64 + gl.arange(0, 64, layout=ROW)
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, OUT))[None, :]
    nothing = gl.zeros([64, BLOCK], gl.float32, LOGITS)
    no_sum = gl.zeros([BLOCK, D], gl.float32, OUT)
    queries, upstream, keys, values, words, ps, dss = rings
    ready_q, empty_q, ready, empty, handed, taken, ready_made, empty_made = barriers
    stage, phase, turn, hand = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    for nth in range(share_of(sizes[4] * sizes[5])):
        tile, kv_head, part, batch, entries, count = work_of(nth, counts, sizes, KV_HEADS, PARTS, FAR)
        at, real = rows_of_tile(row, tile, kv_head, part, batch, sizes, HEADS, KV_HEADS, TILE, PART)
        bit = gl.where(real, gl.full([64], 1, gl.int32, ROW) << (tile * TILE % 32 + row // PART), 0)
        log = gl.load(lse + at, mask=real, other=0.0) * 1.4426950408889634
        log = gl.where(log == float("-inf"), 0.0, log)
        inner = gl.load(delta + at, mask=real, other=0.0)
        acc = gl.zeros([64, D], gl.float32, OUT)
        mbarrier.wait(ready_q, turn)
        turn ^= 1
        if count > 0:
            mbarrier.wait(ready.index(stage), phase)
            mine = queries.index(0).slice(SIDE * 64, 64)
            logits = warpgroup_mma(mine, keys.index(stage).permute((1, 0)), nothing, use_acc=False)
            for i in range(0, count, BLOCK):
                zero = unknown_zero(i)
                my_grad = upstream.index(zero).slice(SIDE * 64, 64)
                dp = warpgroup_mma(my_grad, values.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
                word = words.index(stage).load(gl.SliceLayout(0, LOGITS))
                logits = chosen(logits, word[None, :], bit[:, None], float("-inf"))
                p = gl.exp2(logits * (scale * 1.4426950408889634) - log[:, None])
                mbarrier.wait(taken, hand ^ 1)
                ps.slice(SIDE * 64, 64).store(p.to(TYPE))
                # ptxas moves nothing across this wait: it would move the exponentials behind the one for the product
                later, later_phase = advance(stage, phase, STAGES)
                more = i + BLOCK < count
                mbarrier.wait(ready.index(later), later_phase, pred=more)
                dp = warpgroup_mma_wait(0, deps=[dp])
                ds = (p * (dp - inner[:, None]) * scale).to(TYPE)
                dss.slice(SIDE * 64, 64).store(ds)
                fence_async_shared()
                mbarrier.arrive(handed)
                left = gl.convert_layout(ds, LEFT)
                mbarrier.wait(handed, hand)
                acc = warpgroup_mma(left, keys.index(stage), acc, is_async=True)
                if SIDE == 0:
                    added = warpgroup_mma(
                        ps.permute((1, 0)), upstream.index(zero), no_sum, use_acc=False, is_async=True
                    )
                else:
                    added = warpgroup_mma(
                        dss.permute((1, 0)), queries.index(zero), no_sum, use_acc=False, is_async=True
                    )
                ahead = gl.where(more, later, stage)  # of the last block once more, which is not looked at
                mine = queries.index(zero).slice(SIDE * 64, 64)
                logits = warpgroup_mma(mine, keys.index(ahead).permute((1, 0)), nothing, use_acc=False, is_async=True)
                acc, added, left = warpgroup_mma_wait(1, deps=[acc, added, left])
                mbarrier.arrive(taken)
                mbarrier.wait(empty_made.index(SIDE), hand ^ 1)
                made.index(SIDE).store(added)
                mbarrier.arrive(ready_made.index(SIDE))
                logits = warpgroup_mma_wait(0, deps=[logits])
                mbarrier.arrive(empty.index(stage))
                stage, phase = later, later_phase
                hand ^= 1
        mbarrier.arrive(empty_q)
        out = dq + (gl.convert_layout(at, gl.SliceLayout(1, OUT)) * D)[:, None] + channel
        gl.store(out, acc.to(TYPE), mask=gl.convert_layout(real, gl.SliceLayout(1, OUT))[:, None])


@gluon.jit
def gradient_tiles(
    q, k, v, list_keys, list_words, counts, grad, lse, delta, dq, dk, dv, scale, first, length, num_keys, capacity,
    tiles, of_tile,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr, TILE: gl.constexpr, PART: gl.constexpr,
    PARTS: gl.constexpr, WIDE: gl.constexpr, FAR: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    COMPUTE: gl.constexpr, LOAD: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    TYPE: gl.constexpr = q.dtype.element_ty
    ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, D], TYPE)
    KEYS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, D], TYPE)
    HANDED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, BLOCK], TYPE)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    rings = (
        gl.allocate_shared_memory(TYPE, [1, 128, D], ROWS),
        gl.allocate_shared_memory(TYPE, [1, 128, D], ROWS),
        gl.allocate_shared_memory(TYPE, [STAGES, BLOCK, D], KEYS),
        gl.allocate_shared_memory(TYPE, [STAGES, BLOCK, D], KEYS),
        gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        gl.allocate_shared_memory(TYPE, [128, BLOCK], HANDED),
        gl.allocate_shared_memory(TYPE, [128, BLOCK], HANDED),
    )
    # written as products lie and read by rows, both without conflicts
    made = gl.allocate_shared_memory(gl.float32, [2, BLOCK, D], gl.SwizzledSharedLayout(8, 1, 4, [1, 0]))
    ready_q = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    empty_q = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    handed = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    taken = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    ready_made = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    empty_made = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    # each of the 128 threads that load says so for itself, each of the two groups that compute once
    mbarrier.init(ready_q, count=128)
    mbarrier.init(empty_q, count=2)
    mbarrier.init(handed, count=2)
    mbarrier.init(taken, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=128)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(ready_made.index(i), count=1)
        mbarrier.init(empty_made.index(i), count=1)
    fence_async_shared()
    of_loads, of_sums = (ready_q, empty_q, ready, empty), (ready_made, empty_made)
    barriers = (ready_q, empty_q, ready, empty, handed, taken, ready_made, empty_made)
    sizes = (first, length, num_keys, capacity, tiles, of_tile)
    gl.warp_specialize(
        [
            (_compute, (counts, lse, delta, dq, scale, sizes, rings, made, barriers, 0, TYPE, HEADS, KV_HEADS, D,
                        TILE, PART, PARTS, BLOCK, STAGES, FAR)),
            (_compute, (counts, lse, delta, dq, scale, sizes, rings, made, barriers, 1, TYPE, HEADS, KV_HEADS, D,
                        TILE, PART, PARTS, BLOCK, STAGES, FAR)),
            (_load, (q, k, v, grad, list_keys, list_words, counts, sizes, rings, of_loads, HEADS, KV_HEADS, D, TILE,
                     PART, PARTS, BLOCK, STAGES, WIDE, FAR)),
            (_add, (list_keys, counts, dk, dv, sizes, made, of_sums, KV_HEADS, D, PARTS, BLOCK, FAR)),
        ],
        [4, 4, 4],
        [COMPUTE, LOAD, ADD],
    )  # fmt: skip
