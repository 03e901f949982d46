"""Indexer scores of a tile of queries, a block of keys after the other: what every walk past keys is made of.

Blocks of scores are [keys, queries]: bits of 32 queries are then summed within a thread's registers and between four
threads.
"""

import triton
import triton.language as tl

KINDS = {"gated_sigmoid": 0, "sigmoid": 1, "relu": 2}
GATED_SIGMOID, SIGMOID, RELU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
FORCED = tl.constexpr(3.4028234663852886e38)  # the score of a key that must be chosen


@triton.jit
def tanh(x):
    """tanh(x) by one operation of the special-function unit, off by up to 2⁻¹¹."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """σ(x); FAST spends one operation of the special-function unit on it (off by up to 2⁻¹²) instead of two."""
    if FAST:
        return 0.5 + 0.5 * tanh(0.5 * x)
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _flipped(bits):
    """Bits of a float as an integer that orders as it does, or the other way round."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def ordered(score):
    """int32 numbers that order as the scores do: NaN above all, −0 equal to +0."""
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -2147483648, 0, bits)
    return tl.where(score != score, 2147483647, _flipped(bits))


@triton.jit
def order_near(score):
    """The same of a guess: −0 may be less than +0, and NaN anything."""
    return _flipped(score.to(tl.int32, bitcast=True))


@triton.jit
def unordered(order):
    """The score of which this is the `ordered` number."""
    return _flipped(order).to(tl.float32, bitcast=True)


@triton.jit
def _together(n, s, q, low, high, n_, s_, q_, low_, high_):
    return n + n_, s + s_, q + q_, tl.minimum(low, low_), tl.maximum(high, high_)


@triton.jit
def moments(order, counted):
    """How many `ordered` numbers [P] are counted, mean and deviation of their scores, the least and the largest."""
    score = tl.where(counted, unordered(order), 0.0)
    least, largest = tl.where(counted, order, 2147483647), tl.where(counted, order, -2147483648)
    count, total, squares, low, high = tl.reduce(
        (counted.to(tl.int32), score, score * score, least, largest), 0, _together
    )
    _, mean, deviation = mean_and_deviation(count, total, squares)
    return count, mean, deviation, low, high


@triton.jit
def mean_and_deviation(count, total, squares):
    """How many scores there are, 1 at least, their mean and deviation, of their number, sum and sum of squares."""
    number = tl.maximum(count, 1).to(tl.float32)
    mean = total / number
    return number, mean, tl.sqrt(tl.maximum(squares / number - mean * mean, 0.0))


@triton.jit
def deviations(share):
    """z such that a normally distributed number is above it with probability `share`; off by up to 4.5·10⁻⁴.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.2.23.
    """
    tail = tl.minimum(tl.minimum(share, 1 - share) + 1e-9, 0.5)
    t = tl.sqrt(-2 * tl.log(tail))
    z = t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1 + t * (1.432788 + t * (0.189269 + t * 0.001308)))
    return tl.where(share > 0.5, -z, z)


@triton.jit
def between(low, high):
    """The middle of two int32, rounded down, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def between_counts(low, high, reached, above, want, turn):
    """Where to look for the `want`-th largest of numbers of which `reached` are ≥ low and `above` are > high.

    On the straight line between the two counts, which a smooth tail nearly is; in the middle every third time, so that
    no distribution takes more than three times as many steps as bisection.
    """
    share = (reached - want).to(tl.float32) / tl.maximum(reached - above, 1).to(tl.float32)
    ahead = ((high.to(tl.int64) - low.to(tl.int64)).to(tl.float32) * share).to(tl.int64)
    line = tl.minimum(tl.maximum(low.to(tl.int64) + ahead, low.to(tl.int64) + 1), high.to(tl.int64)).to(tl.int32)
    return tl.where(turn % 3 == 2, between(low, high) + 1, line)


@triton.jit
def narrowed(low, high, reached, above, middle, here, want):
    """`low`, `high` and their counts (`between_counts`) once `here` numbers are known to be ≥ middle."""
    enough = here >= want
    return (
        tl.where(enough, middle, low),
        tl.where(enough, high, middle - 1),
        tl.where(enough, here, reached),
        tl.where(enough, above, here),
    )


@triton.jit
def queries_of_tile(starts, lasts, tile, batch, num_rows, M: tl.constexpr):
    """A tile's M queries: rows, which are real, and the first and the last key that each may see."""
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
def of_queries(
    q, weights, biases, row, real,
    KIND: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, RAW: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """What scores need of M queries, by indexer head: queries [M, DP], weights [M] and a bias.

    w·σ(x + b) is FAST as w/2 + w/2·tanh(x/2 + b/2), and weights and biases are halved for it.
    """
    channel = tl.arange(0, DP)
    half: tl.constexpr = 0.5 if FAST and KIND != RELU else 1.0
    queries, gates, offsets = (), (), ()
    for j in tl.static_range(HEADS):
        of_head = row * HEADS + j
        place = q + of_head[:, None] * D + channel
        queries = queries + (tl.load(place, mask=real[:, None] & (channel < D), other=0.0),)
        gate = tl.full((row.shape[0],), half, tl.float32)
        offset = 0.0
        if not RAW:
            if KIND != SIGMOID:
                gate *= tl.load(weights + of_head, mask=real, other=0.0).to(tl.float32)
            if KIND != RELU:
                offset = tl.load(biases + j).to(tl.float32) * half
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
    if not RAW and KIND != RELU and FAST:
        for j in tl.static_range(HEADS):
            scores += gates[j][None, :]
    for j in tl.static_range(HEADS):
        product = tl.dot(keys, tl.trans(queries[j]), input_precision="ieee")
        if RAW:
            scores = product
        elif KIND == RELU:
            product = product * (1 / tl.sqrt(float(D)))
            scores += tl.where(product < 0, 0.0, product) * gates[j][None, :]  # NaN stays
        elif FAST:
            scores += tanh(product * (0.5 / tl.sqrt(float(D))) + offsets[j]) * gates[j][None, :]
        else:
            scores += sigmoid(product * (1 / tl.sqrt(float(D))) + offsets[j], FAST) * gates[j][None, :]
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
def number_kept(want, available, local, sink, k_min, k_max):
    """How many of the `available` keys a query keeps that wants so many: within the bounds, and all that are forced."""
    forced = tl.minimum(available, tl.minimum(available, local) + tl.minimum(available, sink))
    return tl.minimum(tl.maximum(tl.minimum(tl.maximum(want, k_min), k_max), forced), available)


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
