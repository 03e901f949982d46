"""The best of the keys that `kernels.scan` marked: from words of more than enough keys to words of the chosen ones.

1. `rescore` scores the marked keys of a tile of queries again, few enough to be written: each query's in a row of its
   own;
2. `choose` closes in on the k-th of a row and takes back the bits of what is below;
3. `choose_tied` does so where of equal scores only some are wanted: the earlier keys';
4. `search` bisects over all keys for queries whose bound was too high or marked too much, and scores them all in every
   step: slow, seldom, and right whatever the scores are.
"""

import triton
import triton.language as tl

from kernels.scores import (
    FORCED,
    between,
    between_counts,
    narrowed,
    of_queries,
    order_block,
    ordered,
    queries_of_tile,
    score_block,
    walk,
)

DONE, TIED, SHORT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # states of a query's choice


@triton.jit
def rescore(
    q, k, weights, biases, starts, lasts, list_keys, list_words, list_counts, values, keys, counts, local, sink,
    num_rows, num_keys, capacity, room,
    KIND: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, RAW: tl.constexpr, FAST: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, FORCES: tl.constexpr,
):  # fmt: skip
    """Marked keys [B, R, room] of each query, in order, and their `ordered` scores; `counts` [B, R] says how many.

    Lists are those of tiles of M queries. The count exceeds `room` if there are more or if the list was cut.
    """
    tile, batch = tl.program_id(0), tl.program_id(1)
    row, real, start, last = queries_of_tile(starts, lasts, tile, batch, num_rows, M)
    first, end, entries = walk(list_counts, batch, tile, capacity, start, last, tl.num_programs(0), True)
    bit = (tile * M + tl.arange(0, M)) % 32
    queries, gates, offsets = of_queries(q, weights, biases, row, real, KIND, HEADS, D, DP, RAW, FAST)
    held = tl.zeros((M,), tl.int32)
    for i in range(first, tl.minimum(end, capacity), N):
        element = i + tl.arange(0, N)
        inside = element < tl.minimum(end, capacity)
        key, scores, _ = score_block(
            element, inside, k, queries, gates, offsets, list_keys, list_words, entries, bit,
            batch, num_keys, True, KIND, HEADS, D, DP, RAW, FAST,
        )  # fmt: skip
        # [queries, keys] from here on: neighbouring threads then write neighbours in memory
        word = tl.load(list_words + entries + element, mask=inside, other=0)
        marked = ((word[None, :] >> bit[:, None]) & 1) != 0
        scores = tl.trans(scores)
        if FORCES:
            forced = (key[None, :] > last[:, None] - local) | (key[None, :] < start[:, None] + sink)
            scores = tl.where(forced, FORCED, scores)
        order = ordered(scores)
        rank = held[:, None] + tl.cumsum(marked.to(tl.int32), 1) - 1
        held += tl.sum(marked.to(tl.int32), 1)
        place = row.to(tl.int32)[:, None] * room + rank  # of less than 2³¹: queries of a chunk times `room`
        kept = marked & real[:, None] & (rank < room)
        tl.store(values + place, order, mask=kept)
        tl.store(keys + place, tl.broadcast_to(key[None, :], (M, N)), mask=kept)
    tl.store(counts + row, tl.where(end > capacity, room + 1, held), mask=real)


@triton.jit
def reaching(order, rest, more, least):
    """How many of two blocks of numbers are at least `least`, the second of which counts only where there is `more`."""
    here = tl.sum((order >= least).to(tl.int32))
    if more:
        here += tl.sum((rest >= least).to(tl.int32))
    return here


@triton.jit
def choose(
    values, keys, counts, wanted, words, word_stride, states, num_rows, num_keys, room, P: tl.constexpr
):  # fmt: skip
    """Take back the bits of all but a query's `wanted` best marked keys, where this is simple; `states` says whether.

    DONE, or TIED: of equals only some are wanted, or there are more than 2·P marked keys; or SHORT: too few are marked,
    or more than there was room for. Most queries have no more than P marked keys.
    """
    i, batch = tl.program_id(0), tl.program_id(1)
    row = batch.to(tl.int64) * num_rows + i
    count, want = tl.load(counts + row), tl.load(wanted + row)
    state = tl.where((count > room) | (count < want), SHORT, tl.where(count > 2 * P, TIED, DONE))
    if (state == DONE) & (count > want):
        place, more = tl.arange(0, P), count > P
        order = tl.load(values + row * room + place, mask=place < count, other=-2147483648)
        rest = tl.load(values + row * room + P + place, mask=P + place < count, other=-2147483648)
        high = tl.maximum(tl.max(order), tl.max(rest))
        low = tl.min(tl.where(place < count, order, high))
        low = tl.minimum(low, tl.min(tl.where(P + place < count, rest, high)))
        # `reached` ≥ want reach `low`; `above` < want exceed `high`, or it is the highest
        reached, above, turn = count, 0, 0
        while (reached > want) & (low < high):
            middle = between_counts(low, high, reached, above, want, turn)
            here = reaching(order, rest, more, middle)
            low, high, reached, above = narrowed(low, high, reached, above, middle, here, want)
            turn += 1
        state = tl.where((reached > want) & (want > 0), TIED, state)
        if state == DONE:  # else a later kernel looks at all marked keys
            least = tl.where(want == 0, 2147483647, low)
            word_row = words + batch.to(tl.int64) * word_stride + (i // 32).to(tl.int64) * num_keys
            others = -1 ^ (tl.full((P,), 1, tl.int32) << (i % 32))
            gone = (place < count) & (order < least)
            key = tl.load(keys + row * room + place, mask=gone, other=0)
            tl.atomic_and(word_row + key, others, mask=gone, sem="relaxed")
            if more:
                gone = (P + place < count) & (rest < least)
                key = tl.load(keys + row * room + P + place, mask=gone, other=0)
                tl.atomic_and(word_row + key, others, mask=gone, sem="relaxed")
    tl.store(states + row, state)


@triton.jit
def choose_tied(
    values, keys, counts, wanted, words, word_stride, states, num_rows, num_keys, room,
    ROWS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """`choose` for queries it left TIED, ROWS to a program: any number of marked keys, of equals the earlier."""
    batch = tl.program_id(1).to(tl.int64)
    for i in range(tl.program_id(0) * ROWS, tl.minimum(tl.program_id(0) * ROWS + ROWS, num_rows)):
        row = batch * num_rows + i
        if tl.load(states + row) == TIED:
            count, want = tl.load(counts + row), tl.load(wanted + row)
            place = tl.arange(0, P)
            start = row * room
            low, high = tl.full((), -2147483647, tl.int32), tl.full((), 2147483647, tl.int32)
            reached, above = count, tl.full((), 0, tl.int32)
            while (reached > want) & (low < high):
                middle = between(low, high) + 1
                here = tl.full((), 0, tl.int32)
                for first in range(0, count, P):
                    order = tl.load(values + start + first + place, mask=first + place < count, other=-2147483648)
                    here += tl.sum((order >= middle).to(tl.int32))
                low, high, reached, above = narrowed(low, high, reached, above, middle, here, want)
            space = want - above  # for those equal to `low`; all of them fit where just as many as wanted reach it
            taken = tl.full((), 0, tl.int32)
            for first in range(0, count, P):
                inside = first + place < count
                order = tl.load(values + start + first + place, mask=inside, other=-2147483648)
                tied = (order == low).to(tl.int32)
                rank = taken + tl.cumsum(tied, 0)
                taken += tl.sum(tied)
                gone = inside & ((order < low) | ((order == low) & (rank > space)))
                key = tl.load(keys + start + first + place, mask=gone, other=0)
                target = words + batch * word_stride + (row - batch * num_rows) // 32 * num_keys + key
                others = -1 ^ (tl.full((P,), 1, tl.int32) << (i % 32))
                tl.atomic_and(target, others, mask=gone, sem="relaxed")


@triton.jit
def search(
    q, k, weights, biases, starts, lasts, list_keys, list_words, list_counts, bounds, wanted, words, word_stride,
    states, local, sink, num_rows, num_keys, capacity,
    LISTED: tl.constexpr, KIND: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    RAW: tl.constexpr, FAST: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Set the bits anew, from all keys, for the queries that are SHORT.

    The first two steps look at a query's bound: where many scores are equal, it is mostly these that it lies below.
    """
    tile, batch = tl.program_id(0), tl.program_id(1)
    row, real, start, last = queries_of_tile(starts, lasts, tile, batch, num_rows, M)
    short = real & (tl.load(states + row, mask=real, other=0) == SHORT)
    if tl.max(short.to(tl.int32)) > 0:
        per_list: tl.constexpr = 32 // M
        lists = tl.cdiv(num_rows, 32)
        first, end, entries = walk(list_counts, batch, tile // per_list, capacity, start, last, lists, LISTED)
        queries, gates, offsets = of_queries(q, weights, biases, row, real, KIND, HEADS, D, DP, RAW, FAST)
        bit = tile % per_list * M + tl.arange(0, M)
        want = tl.load(wanted + row, mask=real, other=0)
        low = tl.full((M,), -2147483647, tl.int32)
        high = tl.full((M,), 2147483647, tl.int32)
        reached = tl.full((M,), 2147483647, tl.int32)
        bound = tl.load(bounds + row, mask=real, other=0.0)
        guess = tl.where(bound == bound, ordered(bound), 2147483646) + 1
        guess = tl.where(bound == -1e-30, 0, guess)  # what `kernels.scan.bound` gives for 0
        turn = 0
        while tl.max((short & (reached > want) & (low < high)).to(tl.int32)) > 0:
            middle = between(low, high) + 1
            middle = tl.where((turn == 0) & (guess > low) & (guess <= high), guess, middle)
            middle = tl.where((turn == 1) & (low == guess), low + 1, middle)
            turn += 1
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
