"""Walks of a tile of queries past its keys, scoring them block after block; S scores of a query are never written.

A query's k best of S scores are found in these steps, after `prepare` has said of each query what it may see and
wants:

1. `sample` scores every n-th key, and from these `bound` takes two numbers that, for all but a few queries, the k-th
   score is between: at least k and not many more scores exceed the bound, and not many less than k reach the ceiling;
2. `mark` scores every key, sets the bits of those that reach their query's ceiling, which are chosen for sure, and
   writes those down that are between: few enough to be written. It also makes the sums that a controller wants. On
   sm_90 `kernels.marks` does so;
3. the best of the marked keys are chosen (`kernels.choose`).

Bounds and ceilings decide what a selection costs, never what it is.
"""

import triton
import triton.language as tl

from kernels.scores import (
    FORCED,
    between_counts,
    deviations,
    moments,
    narrowed,
    number_kept,
    of_queries,
    ordered,
    queries_of_tile,
    rights,
    score_block,
    unordered,
    walk,
)

SUMS = {"given": 0, "variance": 1, "entropy": 2, "threshold": 3}
NOTHING, VARIANCE, ENTROPY, REACHED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def prepare(
    starts, lasts, given, out_starts, out_lasts, wanted, ranks, tops, ceilings, ends, walks, start_stride, last_stride,
    given_stride, num_rows, num_words, num_tiles, most, k_min, k_max, local, sink, room, stride,
    SIGMAS: tl.constexpr, GIVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each query, before a score is known: see `kernels.enclose`. With fewer keys than `room` there is no bound."""
    batch = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = i < num_rows
    start = tl.load(starts + batch * start_stride + i, mask=real, other=0).to(tl.int32)
    last = tl.load(lasts + batch * last_stride + i, mask=real, other=-1).to(tl.int32)
    available = tl.maximum(last - start + 1, 0)
    want = tl.minimum(available, most)
    if GIVEN:
        want = tl.load(given + batch * given_stride + i, mask=real, other=0).to(tl.int32)
        want = number_kept(want, available, local, sink, k_min, k_max)
    expected = want.to(tl.float32) / stride
    rank = (expected + SIGMAS * tl.sqrt(expected) + 2).to(tl.int32)
    row = batch * num_rows + i
    tl.store(out_starts + row, start, mask=real)
    tl.store(out_lasts + row, last, mask=real)
    tl.store(wanted + row, want, mask=real)
    tl.store(ranks + row, tl.where(available > room, rank, 0), mask=real)
    if GIVEN:  # else `want` is the most that may be wanted, and a ceiling would be too low
        top = (expected - SIGMAS * tl.sqrt(expected) - 2).to(tl.int32)
        tl.store(tops + row, tl.where(available > room, tl.maximum(top, 0), 0), mask=real)
    ceiling = tl.where(GIVEN & (available <= want), float("-inf"), float("inf"))
    tl.store(ceilings + row, ceiling, mask=real)
    word = tl.program_id(0) * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    end = tl.max(tl.reshape(tl.where(real, last + 1, 0), (BLOCK // 32, 32)), 1)
    tl.store(ends + batch * num_words + word, end, mask=word < num_words)
    # of tiles of 128: where their walk begins and ends, and between which keys all may choose and none must
    tile = tl.program_id(0) * (BLOCK // 128) + tl.arange(0, BLOCK // 128)
    end = tl.max(tl.reshape(tl.where(real, last + 1, 0), (BLOCK // 128, 128)), 1)
    first = tl.min(tl.reshape(tl.where(real, start, 2147483647), (BLOCK // 128, 128)), 1)
    inner = tl.max(tl.reshape(tl.where(real, start, 0), (BLOCK // 128, 128)), 1) + sink
    outer = tl.min(tl.reshape(tl.where(real, last, 2147483647), (BLOCK // 128, 128)), 1) + 1 - local
    walk = walks + (batch * num_tiles + tile) * 4
    tl.store(walk, tl.minimum(first, end), mask=tile < num_tiles)
    tl.store(walk + 1, end, mask=tile < num_tiles)
    tl.store(walk + 2, inner, mask=tile < num_tiles)
    tl.store(walk + 3, outer, mask=tile < num_tiles)


@triton.jit
def sample(
    q, k, weights, biases, starts, lasts, list_keys, list_words, list_counts, samples, ends, num_rows, num_keys,
    capacity, stride, num_samples,
    LISTED: tl.constexpr, KIND: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    RAW: tl.constexpr, FAST: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Scores of one of each `stride` elements, −inf where it may not be chosen: samples [B, R, num_samples].

    Which one of them changes, so that what comes at a regular distance is in the sample as often as among the keys; and
    from tile to tile, so that a sample that misleads one query does not mislead all of its neighbours.
    """
    tile, batch = tl.program_id(0), tl.program_id(1)
    row, real, start, last = queries_of_tile(starts, lasts, tile, batch, num_rows, M)
    first, end, entries = walk(list_counts, batch, tile, capacity, start, last, tl.num_programs(0), LISTED)
    count = (end - first + stride - 1) // stride
    tl.store(ends + batch * tl.num_programs(0) + tile, count)
    queries, gates, offsets = of_queries(q, weights, biases, row, real, KIND, HEADS, D, DP, RAW, FAST)
    bit = tl.arange(0, M)
    for i in range(0, count, N):
        place = i + tl.arange(0, N)
        mixed = (place + tile * 40503).to(tl.uint32) * 2654435769
        element = first + place * stride + ((mixed >> 16) % stride.to(tl.uint32)).to(tl.int32)
        inside = element < end
        key, scores, open_ = score_block(
            element, inside, k, queries, gates, offsets, list_keys, list_words, entries, bit,
            batch, num_keys, LISTED, KIND, HEADS, D, DP, RAW, FAST,
        )  # fmt: skip
        visible, _ = rights(key, inside, open_, start, last, 0, 0)
        target = row[None, :] * num_samples + place[:, None]
        tl.store(
            samples + target, tl.where(visible, scores, float("-inf")), mask=(place < count)[:, None] & real[None, :]
        )


@triton.jit
def enclose(samples, count, rank, top, P: tl.constexpr):
    """What `bound` says of one query's `count` ≤ P samples.

    Where scores are spread as normal ones are, a guess on each side encloses what is looked for.
    """
    least, ceiling = tl.full((), float("nan"), tl.float32), tl.full((), float("inf"), tl.float32)
    place = tl.arange(0, P)
    order = ordered(tl.load(samples + place, mask=place < count, other=float("-inf")))
    reached, mean, deviation, low, high = moments(order, order > -2139095041)  # that of −inf
    if reached >= rank:
        above, turn, most = 0, 0, rank + rank // 16
        # what the search for the bound finds out is known of the ceiling, too
        bottom, peak, over, beyond = low, high, reached, 0
        all_ = reached.to(tl.float32)
        z = deviations((rank + rank // 32).to(tl.float32) / all_)
        while (reached > most) & (low < high):
            middle = between_counts(low, high, reached, above, rank + rank // 32, turn)
            guess = ordered(mean + deviation * (z + tl.where(turn == 0, -0.05, 0.05)))
            middle = tl.where(turn < 2, tl.minimum(tl.maximum(guess, low + 1), high), middle)
            here = tl.sum((order >= middle).to(tl.int32))
            low, high, reached, above = narrowed(low, high, reached, above, middle, here, rank)
            if (middle > bottom) & (middle <= peak):
                bottom, peak, over, beyond = narrowed(bottom, peak, over, beyond, middle, here, top + 1)
            turn += 1
        least = tl.where((low == 0) | (low == 1), -1e-30, unordered(low - 1))  # the next number down
        if top > 0:
            turn, fewest = 0, top - top // 16
            z = deviations((top - top // 32).to(tl.float32) / all_)
            while (beyond < fewest) & (bottom < peak):
                middle = between_counts(bottom, peak, over, beyond, top - top // 32, turn)
                guess = ordered(mean + deviation * (z + 0.05))
                middle = tl.where(turn == 0, tl.minimum(tl.maximum(guess, bottom + 1), peak), middle)
                here = tl.sum((order >= middle).to(tl.int32))
                bottom, peak, over, beyond = narrowed(bottom, peak, over, beyond, middle, here, top + 1)
                turn += 1
            ceiling = unordered(tl.minimum(peak, 2139095039) + 1)  # the next number up, infinity at most
    return least, ceiling


@triton.jit
def bound(
    samples, ends, ranks, tops, bounds, ceilings, num_rows, num_samples, num_tiles, TILE: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """A number just below about the `rank`-th largest of a query's samples, NaN where there are fewer; and one just
    above about the `top`-th, where it is not 0.

    At least `rank` samples exceed the bound, and at most a 16th more unless they are equal. Nothing is below NaN. It is
    never 0, which −0 is not below but whose difference from it has that sign. At most `top` samples reach the ceiling,
    and a 16th less at the least, unless they are equal.
    """
    i, batch = tl.program_id(0), tl.program_id(1)
    row = batch.to(tl.int64) * num_rows + i
    rank = tl.load(ranks + row)
    least = tl.full((), float("nan"), tl.float32)
    if rank > 0:
        top = tl.load(tops + row)
        count = tl.load(ends + batch * num_tiles + i // TILE)
        if count <= P // 2:  # no work for what is not there
            least, ceiling = enclose(samples + row * num_samples, count, rank, top, P // 2)
        else:
            least, ceiling = enclose(samples + row * num_samples, count, rank, top, P)
        tl.store(ceilings + row, ceiling)
    tl.store(bounds + row, least)


@triton.jit
def mark_block(
    i, end, k, queries, gates, offsets, list_keys, list_words, entries, bit, row, real, start, last, least, ceiling,
    marks, held, sure, word_row, room, local, sink, batch, num_keys, tau, threshold, number, a, b, c,
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
    marked = scores
    if EDGE:
        visible, forced = rights(key, inside, open_, start, last, local, sink)
        keep = (keep & visible) | forced
        marked = tl.where(forced, FORCED, scores)
        share = tl.sum(visible.to(tl.float32), 0)
    chosen = keep & ((marked < ceiling[None, :]) == 0) & real[None, :]
    sure += tl.sum(chosen.to(tl.int32), 0)
    value = tl.full((M,), 1, tl.int32) << (bit % M)
    bits = tl.sum(tl.where(chosen, value[None, :], 0), 1)
    tl.store(word_row + key * (32 // M), bits.to(word_row.dtype.element_ty), mask=inside)
    # [queries, keys] from here on: neighbouring threads then write neighbours in memory
    kept = tl.trans((keep & (chosen == 0)).to(tl.int32))
    rank = held[:, None] + tl.cumsum(kept, 1) - 1
    held += tl.sum(kept, 1)
    packed = (tl.trans(marked).to(tl.int32, bitcast=True).to(tl.int64) << 32) | key[None, :].to(tl.int64)
    tl.store(marks + row[:, None] * room + rank, packed, mask=(kept != 0) & real[:, None] & (rank < room))
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
    return held, sure, number + share, a, b, c


@triton.jit
def mark(
    q, k, weights, biases, starts, lasts, list_keys, list_words, list_counts, bounds, ceilings, words, word_stride,
    marks, counts, sures, numbers, sums, local, sink, num_rows, padded, num_keys, capacity, room, tau, threshold,
    LISTED: tl.constexpr, KIND: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    RAW: tl.constexpr, FAST: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Marks [B, `padded`, room] of R queries, M = 32 or 16 to a program: the keys above each query's bound and those
    that must be chosen, but for those that reach its ceiling, whose bits are set in `words`, and which `sures`
    [B, `padded`] counts.

    A mark is 64 bits, of which the upper half is the score. `counts` [B, `padded`] says how many of a query there are;
    what there is no room for is counted only. `numbers` [B, R] says how many a query could have chosen, and `sums`
    [B, R] holds what SUM asks for: the scores' variance, the entropy of softmax(tau · score), or how many reach
    `threshold`.
    """
    tile, batch = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # the longest walks first
    row, real, start, last = queries_of_tile(starts, lasts, tile, batch, num_rows, M)
    per_word: tl.constexpr = 32 // M
    word = tile // per_word
    first, end, entries = walk(list_counts, batch, word, capacity, start, last, tl.cdiv(num_rows, 32), LISTED)
    least = tl.load(bounds + row, mask=real, other=float("inf"))
    ceiling = tl.load(ceilings + row, mask=real, other=float("inf"))
    word_row = words + batch.to(tl.int64) * word_stride + word.to(tl.int64) * num_keys
    if M == 16:  # half a word
        word_row = word_row.to(tl.pointer_type(tl.int16)) + tile % per_word
    queries, gates, offsets = of_queries(q, weights, biases, row, real, KIND, HEADS, D, DP, RAW, FAST)
    bit = tile % per_word * M + tl.arange(0, M)
    list_row = batch.to(tl.int64) * padded + tile * M + tl.arange(0, M)
    held, sure = tl.zeros((M,), tl.int32), tl.zeros((M,), tl.int32)
    number, a, b = tl.zeros((M,), tl.float32), tl.zeros((M,), tl.float32), tl.zeros((M,), tl.float32)
    c = tl.full((M,), -1e30, tl.float32)
    # blocks from `inner` to `outer` are visible to all queries and forced for none
    inner, outer = end, end
    if not LISTED:
        inner = first + tl.cdiv(tl.minimum(tl.maximum(tl.max(start) + sink, first), end) - first, N) * N
        outer = inner + tl.maximum(tl.min(last) + 1 - local - inner, 0) // N * N
    for segment in tl.static_range(3):
        begin, stop = (first, inner) if segment == 0 else ((inner, outer) if segment == 1 else (outer, end))
        if not LISTED or segment == 0:
            for i in range(begin, stop, N):
                held, sure, number, a, b, c = mark_block(
                    i, end, k, queries, gates, offsets, list_keys, list_words, entries, bit, list_row, real, start,
                    last, least, ceiling, marks, held, sure, word_row, room, local, sink, batch, num_keys, tau,
                    threshold, number, a, b, c,
                    LISTED, KIND, HEADS, D, DP, RAW, FAST, M, N, SUM, segment != 1,
                )  # fmt: skip
    tl.store(counts + list_row, held, mask=real)
    tl.store(sures + list_row, sure, mask=real)
    tl.store(numbers + row, number.to(tl.int32), mask=real)
    if SUM == VARIANCE:
        a = b / tl.maximum(number, 1.0)
    if SUM == ENTROPY:
        a = tl.where(number > 0, tl.log(tl.maximum(a, 1e-30)) - b / tl.maximum(a, 1e-30), 0.0)
    if SUM != NOTHING:
        tl.store(sums + row, a, mask=real)
