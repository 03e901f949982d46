"""Walks of a tile of queries past its keys, scoring them block after block; S scores of a query are never written.

A query's k best of S scores are found in these steps:

1. `sample` scores every n-th key, and from these `bound` takes a number that, but for a chance in 10⁶, at least k and
   not many more of all scores exceed;
2. `mark` scores every key and sets a bit, in words (`kernels.words`), for each score above its query's bound. It also
   makes the sums that a controller wants;
3. `rescore` scores the marked keys of a few neighbouring queries again, few enough to be written; `choose` bisects for
   the k-th of them and takes back the bits of what is below;
4. `search` bisects over all keys for queries whose bound was too high or marked too much, and scores them all in every
   step: slow, seldom, and right whatever the scores are.

The bound decides what a selection costs, never what it is. Blocks of scores are [keys, queries]: bits of 32 queries are
then summed within a thread's registers and between four threads.
"""

import triton
import triton.language as tl

KINDS = {"gated_sigmoid": 0, "sigmoid": 1, "relu": 2}
SUMS = {"given": 0, "variance": 1, "entropy": 2, "threshold": 3}
GATED_SIGMOID, SIGMOID, RELU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NOTHING, VARIANCE, ENTROPY, REACHED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
DONE, TIED, SHORT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # states of a query's choice
FORCED = tl.constexpr(3.4028234663852886e38)  # the score of a key that must be chosen


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """σ(x); FAST spends one operation of the special-function unit on it (off by up to 2⁻¹²) instead of two."""
    if FAST:
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], tl.float32, is_pure=True, pack=1)
        return 0.5 + 0.5 * t
    return 1 / (1 + tl.exp(-x))


@triton.jit
def ordered(score):
    """int32 numbers that order as the scores do: NaN above all, −0 equal to +0."""
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -2147483648, 0, bits)
    return tl.where(score != score, 2147483647, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def between(low, high):
    """The middle of two int32, rounded down, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def queries_of_tile(starts, lasts, tile, batch, num_rows, M: tl.constexpr, TILE: tl.constexpr):
    """M queries, TILE of them the tile's: rows, which are real, and the first and the last key that each may see."""
    column = tl.arange(0, M)
    i = tile * TILE + column
    row = batch.to(tl.int64) * num_rows + i
    real = (i < num_rows) & (column < TILE)
    start = tl.load(starts + row, mask=real, other=2147483647)
    last = tl.load(lasts + row, mask=real, other=-1)
    return row, real, start, last


@triton.jit
def walk(list_counts, batch, tile, capacity, start, last, num_tiles, LISTED: tl.constexpr):
    """Where a tile's walk begins and ends, and where its list, if it has one, begins.

    Without LISTED it goes from the first key that any of the queries sees to the last one; with it, through a list of
    keys (`kernels.unions`).
    """
    if LISTED:
        listed = batch.to(tl.int64) * num_tiles + tile
        return 0, tl.load(list_counts + listed), listed * capacity
    end = tl.max(last) + 1
    return tl.minimum(tl.min(start), end), end, tl.full((), 0, tl.int64)


@triton.jit
def of_queries(
    q, weights, biases, row, real,
    KIND: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """What scores need of M queries, by indexer head: queries [M, DP], weights [M] and a bias."""
    channel = tl.arange(0, DP)
    queries, gates, offsets = (), (), ()
    for j in tl.static_range(HEADS):
        of_head = row * HEADS + j
        place = q + of_head[:, None] * D + channel
        queries = queries + (tl.load(place, mask=real[:, None] & (channel < D), other=0.0),)
        gate = tl.zeros((row.shape[0],), tl.float32)
        offset = 0.0
        if not RAW:
            if KIND != SIGMOID:
                gate = tl.load(weights + of_head, mask=real, other=0.0).to(tl.float32)
            if KIND != RELU:
                offset = tl.load(biases + j).to(tl.float32)
        gates = gates + (gate,)
        offsets = offsets + (offset,)
    return queries, gates, offsets


@triton.jit
def score_block(
    element, inside, k, queries, gates, offsets, list_keys, list_words, entries, bit, batch, num_keys,
    LISTED: tl.constexpr, KIND: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    RAW: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Keys [N] of N elements of a walk, their scores [N, M], and whether their list lets a query choose them [N, M].

    RAW, with one head: the score is q·k alone, which orders keys as their scores do.
    """
    key = element
    open_ = inside[:, None]
    if LISTED:
        key = tl.load(list_keys + entries + element, mask=inside, other=0)
        word = tl.load(list_words + entries + element, mask=inside, other=0)
        open_ = ((word[:, None] >> bit[None, :]) & 1) != 0
    channel = tl.arange(0, DP)
    place = (batch.to(tl.int64) * num_keys + key)[:, None] * D + channel
    wanted = inside[:, None]
    if D != DP:
        wanted = wanted & (channel < D)
    keys = tl.load(k + place, mask=wanted, other=0.0)
    scores = tl.zeros((element.shape[0], bit.shape[0]), tl.float32)
    for j in tl.static_range(HEADS):
        product = tl.dot(keys, tl.trans(queries[j]), input_precision="ieee")
        if RAW:
            scores = product
        else:
            product = product * (1 / tl.sqrt(float(D)))
            if KIND == RELU:
                product = tl.where(product < 0, 0.0, product)  # NaN stays
            else:
                product = sigmoid(product + offsets[j], FAST)
            if KIND != SIGMOID:
                product = product * gates[j][None, :]
            scores += product
    if RAW and KIND == RELU:
        scores = tl.where(scores < 0, 0.0, scores)
    return key, scores, open_


@triton.jit
def rights(key, inside, open_, start, last, local, sink):
    """Which pairs [N, M] may be chosen and which must."""
    visible = open_ & inside[:, None] & (key[:, None] >= start[None, :]) & (key[:, None] <= last[None, :])
    forced = visible & ((key[:, None] > last[None, :] - local) | (key[:, None] < start[None, :] + sink))
    return visible, forced


@triton.jit
def order_block(
    element, inside, k, queries, gates, offsets, list_keys, list_words, entries, bit, start, last, local, sink,
    batch, num_keys,
    LISTED: tl.constexpr, KIND: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    RAW: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Keys [N], the order of their scores [N, M], forced ones first, and which may be chosen [N, M]."""
    key, scores, open_ = score_block(
        element, inside, k, queries, gates, offsets, list_keys, list_words, entries, bit,
        batch, num_keys, LISTED, KIND, HEADS, D, DP, RAW, FAST,
    )  # fmt: skip
    visible, forced = rights(key, inside, open_, start, last, local, sink)
    return key, ordered(tl.where(forced, FORCED, scores)), visible


@triton.jit
def sample(
    q, k, weights, biases, starts, lasts, list_keys, list_words, list_counts, samples, ends, num_rows, num_keys,
    capacity, stride, num_samples,
    LISTED: tl.constexpr, KIND: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    RAW: tl.constexpr, FAST: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Scores of every `stride`-th element, −inf where it may not be chosen: samples [B, R, num_samples]."""
    tile, batch = tl.program_id(0), tl.program_id(1)
    row, real, start, last = queries_of_tile(starts, lasts, tile, batch, num_rows, M, M)
    first, end, entries = walk(list_counts, batch, tile, capacity, start, last, tl.num_programs(0), LISTED)
    count = (end - first + stride - 1) // stride
    tl.store(ends + batch * tl.num_programs(0) + tile, count)
    queries, gates, offsets = of_queries(q, weights, biases, row, real, KIND, HEADS, D, DP, RAW)
    bit = tl.arange(0, M)
    for i in range(0, count, N):
        place = i + tl.arange(0, N)
        inside = place < count
        key, scores, open_ = score_block(
            first + place * stride, inside, k, queries, gates, offsets, list_keys, list_words, entries, bit,
            batch, num_keys, LISTED, KIND, HEADS, D, DP, RAW, FAST,
        )  # fmt: skip
        visible, _ = rights(key, inside, open_, start, last, 0, 0)
        target = row[None, :] * num_samples + place[:, None]
        tl.store(samples + target, tl.where(visible, scores, float("-inf")), mask=inside[:, None] & real[None, :])


@triton.jit
def bound(samples, ends, ranks, bounds, num_rows, num_samples, num_tiles, TILE: tl.constexpr, P: tl.constexpr):
    """A number just below a query's `rank`-th largest sample; NaN, below which nothing is, where there are fewer."""
    i, batch = tl.program_id(0), tl.program_id(1)
    row = batch.to(tl.int64) * num_rows + i
    rank = tl.load(ranks + row)
    count = tl.load(ends + batch * num_tiles + i // TILE)
    if (rank <= 0) | (rank > count):
        tl.store(bounds + row, float("nan"))
    else:
        place = tl.arange(0, P)
        order = ordered(tl.load(samples + row * num_samples + place, mask=place < count, other=float("-inf")))
        low = tl.full((), -2139095041, tl.int32)  # −inf: every sample reaches it
        high = tl.maximum(tl.max(order), -2139095040)
        for _ in range(20):  # the rest of the bits would not improve a bound
            middle = between(low, high)
            enough = tl.sum((order >= middle).to(tl.int32)) >= rank
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        bits = low ^ ((low >> 31) & 0x7FFFFFFF)
        value = (bits - tl.where(low < 0, -1, 1)).to(tl.float32, bitcast=True)  # the next number down
        value = tl.where(low == 0, -1e-30, value)
        tl.store(bounds + row, tl.where(low > -2139095041, value, float("nan")))


@triton.jit
def mark_block(
    i, end, k, queries, gates, offsets, list_keys, list_words, entries, bit, value, start, last, least, target,
    in_words, local, sink, batch, num_keys, tau, threshold, number, a, b, c,
    LISTED: tl.constexpr, KIND: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    RAW: tl.constexpr, FAST: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SUM: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One block of `mark`; but at the EDGE of what a tile sees, queries may choose every key and must choose none."""
    element = i + tl.arange(0, N)
    inside = element < end
    key, scores, open_ = score_block(
        element, inside, k, queries, gates, offsets, list_keys, list_words, entries, bit, batch, num_keys,
        LISTED, KIND, HEADS, D, DP, RAW, FAST,
    )  # fmt: skip
    keep = (scores <= least[None, :]) == 0  # NaN, as a score or as a bound, is kept
    share = tl.full((M,), N, tl.float32)
    if EDGE:
        visible, forced = rights(key, inside, open_, start, last, local, sink)
        keep = (keep & visible) | forced
        share = tl.sum(visible.to(tl.float32), 0)
    bits = tl.where(keep, value[None, :], 0)
    bits = tl.sum(tl.reshape(bits, (N, M // 32, 32)), 2)
    tl.store(target[None, :] + key[:, None], bits, mask=inside[:, None] & in_words[None, :])
    if SUM == VARIANCE:  # Chan's update of mean and squared deviation by those of one block
        counted = tl.where(visible, scores, 0.0) if EDGE else scores
        mean = tl.sum(counted, 0) / tl.maximum(share, 1.0)
        deviation = scores - mean[None, :]
        deviation = tl.where(visible, deviation, 0.0) if EDGE else deviation
        both = tl.maximum(number + share, 1.0)
        b += tl.sum(deviation * deviation, 0) + (mean - a) * (mean - a) * number * share / both
        a += (mean - a) * share / both
    if SUM == ENTROPY:  # sums of exp and of logit · exp, from the largest logit
        logits = tau * scores
        highest = tl.maximum(c, tl.max(tl.where(visible, logits, float("-inf")) if EDGE else logits, 0))
        shift = tl.maximum(c - highest, -1e30)
        old = a * tl.exp(shift)
        below = logits - highest[None, :]
        below = tl.where(visible, below, 0.0) if EDGE else below
        p = tl.where(visible, tl.exp(below), 0.0) if EDGE else tl.exp(below)
        b = b * tl.exp(shift) + old * shift + tl.sum(p * below, 0)
        a = old + tl.sum(p, 0)
        c = highest
    if SUM == REACHED:
        reached = scores >= threshold
        reached = (reached & visible) | forced if EDGE else reached
        a += tl.sum(reached.to(tl.float32), 0)
    return number + share, a, b, c


@triton.jit
def mark(
    q, k, weights, biases, starts, lasts, list_keys, list_words, list_counts, bounds, words, word_stride, numbers, sums,
    local, sink, num_rows, num_keys, capacity, tau, threshold,
    LISTED: tl.constexpr, KIND: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    RAW: tl.constexpr, FAST: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Words [B, ⌈R/32⌉, S] of the keys above each query's bound and of those that must be chosen.

    `numbers` says how many a query could have chosen, and `sums` holds what SUM asks for: the scores' variance, the
    entropy of softmax(tau · score), or how many reach `threshold`.
    """
    tile, batch = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # the longest walks first
    row, real, start, last = queries_of_tile(starts, lasts, tile, batch, num_rows, M, M)
    first, end, entries = walk(list_counts, batch, tile, capacity, start, last, tl.num_programs(0), LISTED)
    least = tl.load(bounds + row, mask=real, other=float("inf"))
    queries, gates, offsets = of_queries(q, weights, biases, row, real, KIND, HEADS, D, DP, RAW)
    bit = tl.arange(0, M)
    value = tl.full((M,), 1, tl.int32) << (bit % 32)
    word_row = tile * (M // 32) + tl.arange(0, M // 32)
    in_words = word_row < (num_rows + 31) // 32
    target = words + batch.to(tl.int64) * word_stride + word_row.to(tl.int64) * num_keys
    number, a, b = tl.zeros((M,), tl.float32), tl.zeros((M,), tl.float32), tl.zeros((M,), tl.float32)
    c = tl.full((M,), -1e30, tl.float32)
    # blocks from `inner` to `outer` are visible to all queries and forced for none
    inner, outer = end, end
    if not LISTED:
        inner = first + tl.cdiv(tl.minimum(tl.maximum(tl.max(start) + sink, first), end) - first, N) * N
        outer = inner + tl.maximum(tl.min(last) + 1 - local - inner, 0) // N * N
    for i in range(first, inner, N):
        number, a, b, c = mark_block(
            i, end, k, queries, gates, offsets, list_keys, list_words, entries, bit, value, start, last, least, target,
            in_words, local, sink, batch, num_keys, tau, threshold, number, a, b, c,
            LISTED, KIND, HEADS, D, DP, RAW, FAST, M, N, SUM, True,
        )  # fmt: skip
    if not LISTED:
        for i in range(inner, outer, N):
            number, a, b, c = mark_block(
                i, end, k, queries, gates, offsets, list_keys, list_words, entries, bit, value, start, last, least,
                target, in_words, local, sink, batch, num_keys, tau, threshold, number, a, b, c,
                LISTED, KIND, HEADS, D, DP, RAW, FAST, M, N, SUM, False,
            )  # fmt: skip
        for i in range(outer, end, N):
            number, a, b, c = mark_block(
                i, end, k, queries, gates, offsets, list_keys, list_words, entries, bit, value, start, last, least,
                target, in_words, local, sink, batch, num_keys, tau, threshold, number, a, b, c,
                LISTED, KIND, HEADS, D, DP, RAW, FAST, M, N, SUM, True,
            )  # fmt: skip
    tl.store(numbers + row, number.to(tl.int32), mask=real)
    if SUM == VARIANCE:
        a = b / tl.maximum(number, 1.0)
    if SUM == ENTROPY:
        a = tl.where(number > 0, tl.log(tl.maximum(a, 1e-30)) - b / tl.maximum(a, 1e-30), 0.0)
    if SUM != NOTHING:
        tl.store(sums + row, a, mask=real)


@triton.jit
def rescore(
    q, k, weights, biases, starts, lasts, list_keys, list_words, list_counts, values, local, sink, num_rows, num_keys,
    capacity,
    KIND: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, RAW: tl.constexpr, FAST: tl.constexpr,
    TILE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """`ordered` scores [B, tiles, TILE, capacity] of the marked keys of each tile; those not marked are the least."""
    M: tl.constexpr = 16 if TILE < 16 else TILE
    tile, batch = tl.program_id(0), tl.program_id(1)
    row, real, start, last = queries_of_tile(starts, lasts, tile, batch, num_rows, M, TILE)
    first, end, entries = walk(list_counts, batch, tile, capacity, start, last, tl.num_programs(0), True)
    end = tl.minimum(end, capacity)
    column = tl.arange(0, M)
    bit = (tile * TILE % 32 + column) & 31
    queries, gates, offsets = of_queries(q, weights, biases, row, real, KIND, HEADS, D, DP, RAW)
    for i in range(first, end, N):
        element = i + tl.arange(0, N)
        inside = element < end
        key, scores, open_ = score_block(
            element, inside, k, queries, gates, offsets, list_keys, list_words, entries, bit,
            batch, num_keys, True, KIND, HEADS, D, DP, RAW, FAST,
        )  # fmt: skip
        visible, forced = rights(key, inside, open_, start, last, local, sink)
        order = tl.where(visible, ordered(tl.where(forced, FORCED, scores)), -2147483648)
        target = entries * TILE + column[None, :].to(tl.int64) * capacity + element[:, None]
        tl.store(values + target, order, mask=inside[:, None] & (column < TILE)[None, :])


@triton.jit
def choose(
    values, list_keys, list_counts, wanted, words, word_stride, states, num_rows, num_keys, capacity,
    TILE: tl.constexpr, P: tl.constexpr, DONE_TO: tl.constexpr,
):  # fmt: skip
    """Take back the bits of all but a query's `wanted` best marked keys, where this is simple; `states` says whether.

    DONE, or TIED: of equals only some are wanted, or there are more than P marked keys; or SHORT: too few are marked,
    or more than the list holds. With DONE_TO, queries with up to as many marked keys are done already.
    """
    i, batch = tl.program_id(0), tl.program_id(1)
    row = batch.to(tl.int64) * num_rows + i
    listed = batch.to(tl.int64) * (tl.cdiv(num_rows, 32) * (32 // TILE)) + i // TILE
    count, want = tl.load(list_counts + listed), tl.load(wanted + row)
    state = tl.where(count > capacity, SHORT, tl.where(count > P, TIED, DONE))
    if (state == DONE) & (count > DONE_TO):
        place = tl.arange(0, P)
        start = (listed * TILE + i % TILE) * capacity
        order = tl.load(values + start + place, mask=place < count, other=-2147483648)
        reached = tl.sum((order > -2147483648).to(tl.int32))
        high = tl.max(order)
        low = tl.min(tl.where(order == -2147483648, high, order))
        state = tl.where(reached < want, SHORT, DONE)
        # at least `want` reach `low`; fewer exceed `high`, or it is the highest
        while (reached > want) & (low < high):
            middle = between(low, high) + 1
            here = tl.sum((order >= middle).to(tl.int32))
            enough = here >= want
            low = tl.where(enough, middle, low)
            reached = tl.where(enough, here, reached)
            high = tl.where(enough, high, middle - 1)
        state = tl.where((reached > want) & (want > 0), TIED, state)
        if state == DONE:  # else a later kernel looks at all marked keys
            gone = (order > -2147483648) & ((order < low) | (want == 0))
            key = tl.load(list_keys + listed * capacity + place, mask=gone, other=0)
            target = words + batch.to(tl.int64) * word_stride + (i // 32).to(tl.int64) * num_keys + key
            others = tl.zeros((P,), tl.int32) + (-1 ^ (1 << (i % 32)))
            tl.atomic_and(target, others, mask=gone, sem="relaxed")
    if count > DONE_TO:
        tl.store(states + row, state)


@triton.jit
def choose_tied(
    values, list_keys, list_counts, wanted, words, word_stride, states, num_rows, num_keys, capacity,
    TILE: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """`choose` for queries that it left TIED: any number of marked keys, and of equals the earlier."""
    i, batch = tl.program_id(0), tl.program_id(1)
    row = batch.to(tl.int64) * num_rows + i
    if tl.load(states + row) == TIED:
        listed = batch.to(tl.int64) * (tl.cdiv(num_rows, 32) * (32 // TILE)) + i // TILE
        count, want = tl.load(list_counts + listed), tl.load(wanted + row)
        place = tl.arange(0, P)
        start = (listed * TILE + i % TILE) * capacity
        low, high = tl.full((), -2147483647, tl.int32), tl.full((), 2147483647, tl.int32)
        reached = tl.full((), 0, tl.int32)
        for first in range(0, count, P):
            order = tl.load(values + start + first + place, mask=first + place < count, other=-2147483648)
            reached += tl.sum((order > -2147483648).to(tl.int32))
        if reached < want:
            tl.store(states + row, SHORT)
        else:
            while (reached > want) & (low < high):
                middle = between(low, high) + 1
                here = tl.full((), 0, tl.int32)
                for first in range(0, count, P):
                    order = tl.load(values + start + first + place, mask=first + place < count, other=-2147483648)
                    here += tl.sum((order >= middle).to(tl.int32))
                enough = here >= want
                low = tl.where(enough, middle, low)
                reached = tl.where(enough, here, reached)
                high = tl.where(enough, high, middle - 1)
            above = tl.full((), 0, tl.int32)
            for first in range(0, count, P):
                order = tl.load(values + start + first + place, mask=first + place < count, other=-2147483648)
                above += tl.sum((order > low).to(tl.int32))
            space = want - above
            taken = tl.full((), 0, tl.int32)
            for first in range(0, count, P):
                order = tl.load(values + start + first + place, mask=first + place < count, other=-2147483648)
                tied = (order == low).to(tl.int32)
                rank = taken + tl.cumsum(tied, 0)
                taken += tl.sum(tied)
                gone = (order > -2147483648) & ((order < low) | ((order == low) & (rank > space)))
                key = tl.load(list_keys + listed * capacity + first + place, mask=gone, other=0)
                target = words + batch.to(tl.int64) * word_stride + (i // 32).to(tl.int64) * num_keys + key
                others = tl.zeros((P,), tl.int32) + (-1 ^ (1 << (i % 32)))
                tl.atomic_and(target, others, mask=gone, sem="relaxed")


@triton.jit
def search(
    q, k, weights, biases, starts, lasts, list_keys, list_words, list_counts, wanted, words, word_stride, states,
    local, sink, num_rows, num_keys, capacity,
    LISTED: tl.constexpr, KIND: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    RAW: tl.constexpr, FAST: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Set the bits anew, from all keys, for the queries that are SHORT."""
    tile, batch = tl.program_id(0), tl.program_id(1)
    row, real, start, last = queries_of_tile(starts, lasts, tile, batch, num_rows, M, M)
    short = real & (tl.load(states + row, mask=real, other=0) == SHORT)
    if tl.max(short.to(tl.int32)) > 0:
        per_list: tl.constexpr = 32 // M
        lists = tl.cdiv(num_rows, 32)
        first, end, entries = walk(list_counts, batch, tile // per_list, capacity, start, last, lists, LISTED)
        queries, gates, offsets = of_queries(q, weights, biases, row, real, KIND, HEADS, D, DP, RAW)
        bit = tile % per_list * M + tl.arange(0, M)
        want = tl.load(wanted + row, mask=real, other=0)
        low = tl.full((M,), -2147483647, tl.int32)
        high = tl.full((M,), 2147483647, tl.int32)
        reached = tl.full((M,), 2147483647, tl.int32)
        while tl.max((short & (reached > want) & (low < high)).to(tl.int32)) > 0:
            middle = between(low, high) + 1
            here = tl.zeros((M,), tl.int32)
            for i in range(first, end, N):
                element = i + tl.arange(0, N)
                inside = element < end
                key, order, visible = order_block(
                    element, inside, k, queries, gates, offsets, list_keys, list_words, entries, bit, start, last,
                    local, sink, batch, num_keys, LISTED, KIND, HEADS, D, DP, RAW, FAST,
                )  # fmt: skip
                here += tl.sum((visible & (order >= middle[None, :])).to(tl.int32), 0)
            enough = here >= want
            low = tl.where(enough, middle, low)
            reached = tl.where(enough, here, reached)
            high = tl.where(enough, high, middle - 1)
        above = tl.zeros((M,), tl.int32)
        for i in range(first, end, N):
            element = i + tl.arange(0, N)
            inside = element < end
            key, order, visible = order_block(
                element, inside, k, queries, gates, offsets, list_keys, list_words, entries, bit, start, last,
                local, sink, batch, num_keys, LISTED, KIND, HEADS, D, DP, RAW, FAST,
            )  # fmt: skip
            above += tl.sum((visible & (order > low[None, :])).to(tl.int32), 0)
        taken = tl.zeros((M,), tl.int32)
        word_row = words + batch.to(tl.int64) * word_stride + (tile // per_list).to(tl.int64) * num_keys
        value = tl.where(short, tl.full((M,), 1, tl.int32) << bit, 0)
        others = -1 ^ tl.sum(value)
        for i in range(first, end, N):
            element = i + tl.arange(0, N)
            inside = element < end
            key, order, visible = order_block(
                element, inside, k, queries, gates, offsets, list_keys, list_words, entries, bit, start, last,
                local, sink, batch, num_keys, LISTED, KIND, HEADS, D, DP, RAW, FAST,
            )  # fmt: skip
            tied = visible & (order == low[None, :])
            rank = taken[None, :] + tl.cumsum(tied.to(tl.int32), 0)
            taken += tl.sum(tied.to(tl.int32), 0)
            chosen = visible & ((order > low[None, :]) | (tied & (rank <= (want - above)[None, :])))
            bits = tl.sum(tl.where(chosen, value[None, :], 0), 1)
            tl.atomic_and(word_row + key, tl.zeros((N,), tl.int32) + others, mask=inside, sem="relaxed")
            tl.atomic_or(word_row + key, bits, mask=inside, sem="relaxed")
