"""The attention's mean over heads on sm_90: warps that only load, and two groups of warps that only compute.

It computes what `kernels.target.mean` does, 256 keys of a list at a time. Four warps gather keys, and the queries of up
to four heads that share them, into rings in shared memory. Two groups of four warps take 128 keys each, so that the
exponentials of one run beside the products of the other. Sums over heads stay in a thread's registers.

Floor: 2·d operations and one exponential per head, query and key of the union. What limits it is what is loaded: with
four heads to a key, 96 KiB for 8.4 million operations.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma

from kernels.hopper import advance, arrived, copy, dealt, share_of

KEYS = gl.constexpr(128)  # of a group of warps
RUNS = 2  # pieces of work for the list of one tile: side by side they read its queries from the L2 cache
# as in `kernels.hopper`
LAUNCH = {"KEY_STAGES": 2, "STAGES": 3, "COMPUTE": 192, "LOAD": 120, "num_warps": 4, "maxnreg": 168}


@gluon.jit
def _work(number, counts, capacity, tiles, RUNS: gl.constexpr):
    """Of a piece of work: tile, batch, list, and where its part of the list begins and ends."""
    list_, run = number // RUNS, number % RUNS
    count = gl.minimum(gl.load(counts + list_), capacity)
    length = gl.cdiv(gl.cdiv(count, 2 * KEYS), RUNS) * (2 * KEYS)
    return list_ % tiles, (list_ // tiles).to(gl.int64), list_, run * length, gl.minimum((run + 1) * length, count)


@gluon.jit
def _load(
    q, k, logs, list_keys, counts, sizes, rings, barriers,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr, PART: gl.constexpr, PARTS: gl.constexpr,
    RUNS: gl.constexpr, KEY_STAGES: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])  # 16 bytes of a thread
    GROUP: gl.constexpr = HEADS // KV_HEADS
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    entry = gl.arange(0, KEYS, layout=gl.SliceLayout(1, LAYOUT))
    row = gl.arange(0, PART * 32, layout=gl.SliceLayout(1, LAYOUT))
    log_row = gl.arange(0, PART * 32, layout=gl.BlockedLayout([1], [32], [4], [0]))
    keys, queries, sums = rings
    ready_k, empty_k, ready_q, empty_q = barriers
    first, length, num_keys, capacity, tiles, works = sizes
    k_stage, k_phase, stage, phase = gl.to_tensor(0), gl.to_tensor(1), gl.to_tensor(0), gl.to_tensor(1)
    for nth in range(share_of(works)):
        tile, batch, list_, begin, end = _work(dealt(nth, works), counts, capacity, tiles, RUNS)
        keys_at = list_keys + list_.to(gl.int64) * capacity
        padded = gl.cdiv(end, 128) * 128  # as lists are
        query = first + tile * 32
        at = (batch * length + query) * HEADS
        for i in range(begin, end, 2 * KEYS):
            lower = gl.load(keys_at + i + entry)
            upper = gl.load(keys_at + gl.minimum(i + KEYS + entry, padded - 1))
            if WIDE:
                lower, upper = lower.to(gl.int64), upper.to(gl.int64)
            for kv_head in range(KV_HEADS):
                of_head = k + (batch * num_keys * KV_HEADS + kv_head) * D
                mbarrier.wait(empty_k.index(k_stage), k_phase)
                copy(keys.index(2 * k_stage), of_head + ((lower * (KV_HEADS * D))[:, None] + channel))
                copy(keys.index(2 * k_stage + 1), of_head + ((upper * (KV_HEADS * D))[:, None] + channel))
                arrived(ready_k.index(k_stage))
                k_stage, k_phase = advance(k_stage, k_phase, KEY_STAGES)
                for part in range(PARTS):
                    # one head's queries after the other's; of those that are not there, others that may be read
                    head = kv_head * GROUP + gl.minimum(part * PART + row // 32, GROUP - 1)
                    place = gl.minimum(row % 32, length - 1 - query) * HEADS + head
                    log_head = kv_head * GROUP + gl.minimum(part * PART + log_row // 32, GROUP - 1)
                    log_place = gl.minimum(log_row % 32, length - 1 - query) * HEADS + log_head
                    mbarrier.wait(empty_q.index(stage), phase)
                    copy(queries.index(stage), q + at * D + ((place * D)[:, None] + channel))
                    copy(sums.index(stage), logs + at + log_place)
                    arrived(ready_q.index(stage))
                    stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def _compute(
    counts, out, scale, unit, sizes, rings, barriers,
    SIDE: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, PART: gl.constexpr, PARTS: gl.constexpr,
    RUNS: gl.constexpr, KEY_STAGES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART * 32, 16])
    MEAN: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
    GROUP: gl.constexpr = HEADS // KV_HEADS
    entry = SIDE * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, MEAN))
    query = gl.arange(0, 32, layout=gl.SliceLayout(0, MEAN))
    head = gl.arange(0, PART * 32, layout=gl.SliceLayout(0, LAYOUT)) // 32
    nothing = gl.zeros([KEYS, PART * 32], gl.float32, LAYOUT)
    keys, queries, sums = rings
    ready_k, empty_k, ready_q, empty_q = barriers
    capacity, tiles, works = sizes[3], sizes[4], sizes[5]
    k_stage, k_phase, stage, phase = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    for nth in range(share_of(works)):
        tile, batch, list_, begin, end = _work(dealt(nth, works), counts, capacity, tiles, RUNS)
        for i in range(begin, end, 2 * KEYS):
            mean = gl.zeros([KEYS, 32], gl.float32, MEAN)
            for _kv_head in range(KV_HEADS):
                mbarrier.wait(ready_k.index(k_stage), k_phase)
                for part in range(PARTS):
                    mbarrier.wait(ready_q.index(stage), phase)
                    of_heads = queries.index(stage).permute((1, 0))
                    logits = warpgroup_mma(keys.index(2 * k_stage + SIDE), of_heads, nothing, use_acc=False)
                    log = sums.index(stage).load(gl.SliceLayout(0, LAYOUT))
                    mbarrier.arrive(empty_q.index(stage))
                    if GROUP % PART != 0:
                        log = gl.where(part * PART + head < GROUP, log, float("inf"))
                    p = gl.exp2(logits * scale - log[None, :])
                    of_part = gl.sum(gl.reshape(p, [KEYS, PART, 32]), 1)
                    mean += gl.convert_layout(of_part, MEAN, assert_trivial=True)
                    stage, phase = advance(stage, phase, STAGES)
                mbarrier.arrive(empty_k.index(k_stage))
                k_stage, k_phase = advance(k_stage, k_phase, KEY_STAGES)
            place = (list_.to(gl.int64) * capacity + i + entry) * 32
            mean = (mean * unit).to(out.dtype.element_ty)
            gl.store(out + place[:, None] + query[None, :], mean, mask=(i + entry < end)[:, None])


@gluon.jit
def mean_tiles(
    q, k, logs, list_keys, counts, out, scale, unit, first, length, num_keys, capacity, tiles, works,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr, PART: gl.constexpr, PARTS: gl.constexpr,
    WIDE: gl.constexpr, RUNS: gl.constexpr, KEY_STAGES: gl.constexpr, STAGES: gl.constexpr, COMPUTE: gl.constexpr,
    LOAD: gl.constexpr,
):  # fmt: skip
    TYPE: gl.constexpr = q.dtype.element_ty
    ROWS: gl.constexpr = PART * 32
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    KEY: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, D], TYPE)
    QUERY: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], TYPE)
    rings = (
        gl.allocate_shared_memory(TYPE, [2 * KEY_STAGES, KEYS, D], KEY),
        gl.allocate_shared_memory(TYPE, [STAGES, ROWS, D], QUERY),
        gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0])),
    )
    ready_k = gl.allocate_shared_memory(gl.int64, [KEY_STAGES, 1], BARRIER)
    empty_k = gl.allocate_shared_memory(gl.int64, [KEY_STAGES, 1], BARRIER)
    ready_q = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty_q = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    # each of the 128 threads that load says so for itself, each of the two groups that compute once
    for i in gl.static_range(KEY_STAGES):
        mbarrier.init(ready_k.index(i), count=128)
        mbarrier.init(empty_k.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready_q.index(i), count=128)
        mbarrier.init(empty_q.index(i), count=2)
    fence_async_shared()
    barriers = (ready_k, empty_k, ready_q, empty_q)
    sizes = (first, length, num_keys, capacity, tiles, works)
    gl.warp_specialize(
        [
            (_compute, (counts, out, scale, unit, sizes, rings, barriers, 0, HEADS, KV_HEADS, PART, PARTS, RUNS,
                        KEY_STAGES, STAGES)),
            (_compute, (counts, out, scale, unit, sizes, rings, barriers, 1, HEADS, KV_HEADS, PART, PARTS, RUNS,
                        KEY_STAGES, STAGES)),
            (_load, (q, k, logs, list_keys, counts, sizes, rings, barriers, HEADS, KV_HEADS, D, PART, PARTS, RUNS,
                     KEY_STAGES, STAGES, WIDE)),
        ],
        [4, 4],
        [COMPUTE, LOAD],
    )  # fmt: skip
