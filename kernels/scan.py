"""Walks of a tile of queries past its keys, scoring them block after block; only what may be selected is written.

A query's k best of S scores are found without writing S scores:

1. `sample` scores every n-th key, and from these `bound` takes a bound that, but for a chance in 10⁵, at least k and at
   most `capacity` of all scores exceed;
2. `collect` scores every key and appends {key, score} of those above the bound to the query's list, in the order of the
   keys, together with the sums that a controller wants;
3. a query whose list came out short or overflowed is searched by `search`, which bisects over the bits of a score and
   scores all keys at every step.

The bound decides what a selection costs, never what it is.
"""

import triton
import triton.language as tl

KINDS = {"gated_sigmoid": 0, "sigmoid": 1, "relu": 2}
SUMS = {"given": 0, "variance": 1, "entropy": 2, "threshold": 3}
GATED_SIGMOID, SIGMOID, RELU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NOTHING, VARIANCE, ENTROPY, REACHED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


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
def queries_of_tile(starts, lasts, tile, batch, num_rows, M: tl.constexpr):
    """M queries: their rows, which are real, and the first and the last key that each may see."""
    i = tile * M + tl.arange(0, M)
    row = batch.to(tl.int64) * num_rows + i
    real = i < num_rows
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
def score_block(
    element, inside, q, k, weights, biases, list_keys, list_words, entries, row, real, start, last, local, sink,
    batch, num_keys,
    LISTED: tl.constexpr, KIND: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    RAW: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Keys [N], scores [M, N], and which pairs may be and which must be chosen, for N elements of a walk.

    RAW, with one head: the score is q·k alone, which orders keys as their scores do.
    """
    key = element
    if LISTED:
        key = tl.load(list_keys + entries + element, mask=inside, other=0)
        word = tl.load(list_words + entries + element, mask=inside, other=0)
    channel = tl.arange(0, DP)
    place = (batch.to(tl.int64) * num_keys + key)[:, None] * D + channel
    keys = tl.load(k + place, mask=inside[:, None] & (channel < D), other=0.0)
    scores = tl.zeros((row.shape[0], element.shape[0]), tl.float32)
    for j in tl.static_range(HEADS):
        of_head = row * HEADS + j
        queries = tl.load(q + of_head[:, None] * D + channel, mask=real[:, None] & (channel < D), other=0.0)
        product = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        if RAW:
            scores = product
        else:
            product = product * (1 / tl.sqrt(float(D)))
            if KIND == RELU:
                product = tl.where(product < 0, 0.0, product)  # NaN stays
            else:
                product = sigmoid(product + tl.load(biases + j), FAST)
            if KIND != SIGMOID:
                product = product * tl.load(weights + of_head, mask=real, other=0.0)[:, None]
            scores += product
    if RAW and KIND == RELU:
        scores = tl.where(scores < 0, 0.0, scores)
    visible = inside[None, :] & (key[None, :] >= start[:, None]) & (key[None, :] <= last[:, None])
    if LISTED:
        bit = tl.arange(0, row.shape[0])
        visible = visible & (((word[None, :] >> bit[:, None]) & 1) != 0)
    forced = visible & ((key[None, :] > last[:, None] - local) | (key[None, :] < start[:, None] + sink))
    return key, scores, visible, forced


@triton.jit
def sample(
    q, k, weights, biases, starts, lasts, list_keys, list_words, list_counts, samples, ends, local, sink,
    num_rows, num_keys, capacity, stride, num_samples,
    LISTED: tl.constexpr, KIND: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    RAW: tl.constexpr, FAST: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Scores of every `stride`-th element, −inf where it may not be chosen, in samples [B, R, num_samples]."""
    tile, batch = tl.program_id(0), tl.program_id(1)
    row, real, start, last = queries_of_tile(starts, lasts, tile, batch, num_rows, M)
    first, end, entries = walk(list_counts, batch, tile, capacity, start, last, tl.num_programs(0), LISTED)
    count = (end - first + stride - 1) // stride
    tl.store(ends + batch * tl.num_programs(0) + tile, count)
    for i in range(0, count, N):
        place = i + tl.arange(0, N)
        inside = place < count
        _, scores, visible, _ = score_block(
            first + place * stride, inside, q, k, weights, biases, list_keys, list_words, entries, row, real, start,
            last, local, sink, batch, num_keys, LISTED, KIND, HEADS, D, DP, RAW, FAST,
        )  # fmt: skip
        scores = tl.where(visible, scores, float("-inf"))
        tl.store(samples + row[:, None] * num_samples + place, scores, mask=real[:, None] & inside)


@triton.jit
def bound(samples, ends, ranks, bounds, num_rows, num_samples, num_tiles, M: tl.constexpr, P: tl.constexpr):
    """A number just below a row's `rank`-th largest sample; NaN, below which nothing is, where there are fewer."""
    row, batch = tl.program_id(0), tl.program_id(1)
    place = batch.to(tl.int64) * num_rows + row
    rank = tl.load(ranks + place)
    count = tl.load(ends + batch * num_tiles + row // M)
    if (rank > count) | (rank <= 0):
        tl.store(bounds + place, float("nan"))
    else:
        i = tl.arange(0, P)
        score = tl.load(samples + place * num_samples + i, mask=i < count, other=float("-inf"))
        score = ordered(score)
        # bisect from the sign down; 20 bits of 32 will do for a bound
        least = tl.where(tl.sum((score >= 0).to(tl.int32)) >= rank, 0, -2147483648)
        for step in range(1, 20):
            higher = least + (1 << (31 - step))
            least = tl.where(tl.sum((score >= higher).to(tl.int32)) >= rank, higher, least)
        bits = least ^ ((least >> 31) & 0x7FFFFFFF)
        value = (bits - tl.where(least < 0, -1, 1)).to(tl.float32, bitcast=True)  # the next number down
        value = tl.where(least <= -2139095041, float("nan"), value)  # −inf: fewer samples than the rank
        value = tl.where(least == 0, -1e-30, value)
        tl.store(bounds + place, value)


@triton.jit
def collect(
    q, k, weights, biases, starts, lasts, list_keys, list_words, list_counts, bounds, found, counts, numbers, sums,
    local, sink, num_rows, num_keys, capacity, room, tau, threshold,
    LISTED: tl.constexpr, KIND: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    RAW: tl.constexpr, FAST: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Append {score, key} above each row's bound to its list found [B, R, room], as the halves of an int64.

    `counts` says how many there were, more than `room` included, `numbers` how many could have been chosen, and `sums`
    holds what SUM asks for: the scores' variance, the entropy of softmax(tau · score) or how many reach `threshold`.
    """
    tile, batch = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # the longest walks first
    row, real, start, last = queries_of_tile(starts, lasts, tile, batch, num_rows, M)
    first, end, entries = walk(list_counts, batch, tile, capacity, start, last, tl.num_programs(0), LISTED)
    least = tl.load(bounds + row, mask=real, other=0.0)
    count = tl.zeros((M,), tl.int32)
    number = tl.zeros((M,), tl.int32)
    a, b, c = tl.zeros((M,), tl.float32), tl.zeros((M,), tl.float32), tl.full((M,), -1e30, tl.float32)
    for i in range(first, end, N):
        element = i + tl.arange(0, N)
        key, scores, visible, forced = score_block(
            element, element < end, q, k, weights, biases, list_keys, list_words, entries, row, real, start,
            last, local, sink, batch, num_keys, LISTED, KIND, HEADS, D, DP, RAW, FAST,
        )  # fmt: skip
        keep = visible & ((scores <= least[:, None]) == 0)  # NaN, as a score or as a bound, is kept
        keep = keep | forced
        kept = keep.to(tl.int32)
        place = count[:, None] + tl.cumsum(kept, 1) - 1
        entry = (scores.to(tl.int32, bitcast=True).to(tl.int64) << 32) | key.to(tl.int64)[None, :]
        entry = tl.where(forced, (tl.full((), 0x7F7FFFFF, tl.int64) << 32) | key.to(tl.int64)[None, :], entry)
        tl.store(found + row[:, None] * room + place, entry, mask=keep & (place < room))
        count += tl.sum(kept, 1)
        if LISTED or SUM == VARIANCE or SUM == ENTROPY:
            here = tl.sum(visible.to(tl.int32), 1)
        if SUM == VARIANCE:  # Chan's update of mean and squared deviation by those of one block
            share = here.to(tl.float32)
            mean = tl.sum(tl.where(visible, scores, 0.0), 1) / tl.maximum(share, 1.0)
            deviation = tl.where(visible, scores - mean[:, None], 0.0)
            both = tl.maximum(number.to(tl.float32) + share, 1.0)
            b += tl.sum(deviation * deviation, 1) + (mean - a) * (mean - a) * number.to(tl.float32) * share / both
            a += (mean - a) * share / both
        if SUM == ENTROPY:  # sums of exp and of logit · exp, from the largest logit
            logits = tl.where(visible, tau * scores, float("-inf"))
            highest = tl.maximum(c, tl.max(logits, 1))
            shift = c - highest
            old = a * tl.exp(shift)
            p = tl.exp(logits - highest[:, None])
            b = b * tl.exp(shift) + old * tl.maximum(shift, -1e30)
            b += tl.sum(tl.where(visible, p * (logits - highest[:, None]), 0.0), 1)
            a = old + tl.sum(p, 1)
            c = highest
        if SUM == REACHED:
            a += tl.sum(((visible & (scores >= threshold)) | forced).to(tl.float32), 1)
        if LISTED or SUM == VARIANCE or SUM == ENTROPY:
            number += here
    tl.store(counts + row, count, mask=real)
    tl.store(numbers + row, number, mask=real)
    if SUM == VARIANCE:
        a = b / tl.maximum(number.to(tl.float32), 1.0)
    if SUM == ENTROPY:
        a = tl.where(number > 0, tl.log(tl.maximum(a, 1e-30)) - b / tl.maximum(a, 1e-30), 0.0)
    if SUM != NOTHING:
        tl.store(sums + row, a, mask=real)


@triton.jit
def search(
    q, k, weights, biases, starts, lasts, list_keys, list_words, list_counts, wanted, found, counts,
    local, sink, num_rows, num_keys, capacity, room,
    LISTED: tl.constexpr, KIND: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    RAW: tl.constexpr, FAST: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Replace lists that came out shorter than `wanted` or longer than `room` by exactly the wanted keys."""
    tile, batch = tl.program_id(0), tl.program_id(1)
    row, real, start, last = queries_of_tile(starts, lasts, tile, batch, num_rows, M)
    count = tl.load(counts + row, mask=real, other=0)
    want = tl.load(wanted + row, mask=real, other=0)
    failed = real & ((count < want) | (count > room))
    if tl.max(failed.to(tl.int32)) > 0:
        first, end, entries = walk(list_counts, batch, tile, capacity, start, last, tl.num_programs(0), LISTED)
        least = tl.full((M,), -2147483648, tl.int32)
        above = tl.zeros((M,), tl.int32)
        for step in range(32):
            higher = tl.where(step == 0, 0, least + (1 << (31 - step)))
            reached = tl.zeros((M,), tl.int32)
            for i in range(first, end, N):
                element = i + tl.arange(0, N)
                key, scores, visible, forced = score_block(
                    element, element < end, q, k, weights, biases, list_keys, list_words, entries, row, real, start,
                    last, local, sink, batch, num_keys, LISTED, KIND, HEADS, D, DP, RAW, FAST,
                )  # fmt: skip
                order = ordered(tl.where(forced, 3.4028234663852886e38, scores))
                reached += tl.sum((visible & (order >= higher[:, None])).to(tl.int32), 1)
            enough = reached >= want
            least = tl.where(enough, higher, least)
            above = tl.where(enough, above, reached)  # how many lie above the bound, in the end
        count = tl.zeros((M,), tl.int32)
        equal = tl.zeros((M,), tl.int32)
        for i in range(first, end, N):
            element = i + tl.arange(0, N)
            key, scores, visible, forced = score_block(
                element, element < end, q, k, weights, biases, list_keys, list_words, entries, row, real, start,
                last, local, sink, batch, num_keys, LISTED, KIND, HEADS, D, DP, RAW, FAST,
            )  # fmt: skip
            order = ordered(tl.where(forced, 3.4028234663852886e38, scores))
            tied = visible & (order == least[:, None])
            rank = equal[:, None] + tl.cumsum(tied.to(tl.int32), 1)
            equal += tl.sum(tied.to(tl.int32), 1)
            keep = (visible & (order > least[:, None])) | (tied & (rank <= (want - above)[:, None]))
            keep = keep & failed[:, None]
            place = count[:, None] + tl.cumsum(keep.to(tl.int32), 1) - 1
            tl.store(found + row[:, None] * room + place, key.to(tl.int64)[None, :] & 0xFFFFFFFF, mask=keep)
            count += tl.sum(keep.to(tl.int32), 1)
        tl.store(counts + row, count, mask=failed)


@triton.jit
def choose(found, counts, wanted, words, word_stride, num_rows, num_keys, room, P: tl.constexpr):
    """Set the bits of each row's `wanted` best of its list in words [B, ⌈R/32⌉, S]; ties go to the earlier key."""
    row, batch = tl.program_id(0), tl.program_id(1)
    place = batch.to(tl.int64) * num_rows + row
    count, want = tl.load(counts + place), tl.load(wanted + place)
    i = tl.arange(0, P)
    inside = i < count
    entry = tl.load(found + place * room + i, mask=inside, other=0)
    chosen = inside
    if count > want:
        order = tl.where(inside, ordered((entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)), -2147483648)
        least = tl.where(tl.sum((inside & (order >= 0)).to(tl.int32)) >= want, 0, -2147483648)
        for step in range(1, 32):
            higher = least + (1 << (31 - step))
            least = tl.where(tl.sum((inside & (order >= higher)).to(tl.int32)) >= want, higher, least)
        above = inside & (order > least)
        tied = inside & (order == least)
        space = want - tl.sum(above.to(tl.int32))
        chosen = above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= space))
    key = entry & 0x7FFFFFFF
    bit = tl.full((), 1, tl.int32) << (row % 32)
    target = words + batch.to(tl.int64) * word_stride + (row // 32).to(tl.int64) * num_keys + key
    tl.atomic_or(target, tl.zeros((P,), tl.int32) + bit, mask=chosen, sem="relaxed")
