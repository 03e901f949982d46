"""The best of the keys that `kernels.scan` marked: from lists of more than enough keys to words of the chosen ones.

The bits of keys that reach a query's ceiling are set already; as many less of the marks are chosen.

1. `choose` closes in on the k-th of a query's marks, and of equal scores takes the earlier keys';
2. `choose_long` does so where there are more marks than a program holds;
3. queries whose bound was too high or marked too much, or whose ceiling was too low, are found among all keys: as many
   as `single_out` has places for by `kernels.few`, the rest by `search`, which bisects and scores all keys in every
   step: slow, seldom, and right whatever the scores are.
"""

import triton
import triton.language as tl

from kernels.scores import (
    between,
    between_counts,
    narrowed,
    of_queries,
    order_block,
    ordered,
    queries_of_tile,
    walk,
)

DONE, LONG, SHORT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # states of a query's choice


@triton.jit
def orders_at(marks, place, inside):
    """The `ordered` scores of marks, pairs of key and score; the lowest of all numbers where there is none."""
    score = tl.load(marks + 2 * place + 1, mask=inside, other=0).to(tl.float32, bitcast=True)
    return tl.where(inside, ordered(score), -2147483648)


@triton.jit
def keys_at(marks, place, inside):
    return tl.load(marks + 2 * place, mask=inside, other=0)


@triton.jit
def reaching(order, rest, more, least):
    """How many of two blocks of numbers are at least `least`, the second of which counts only where there is `more`."""
    here = tl.sum((order >= least).to(tl.int32))
    if more:
        here += tl.sum((rest >= least).to(tl.int32))
    return here


@triton.jit
def set_earlier(marks, count, least, some, word_row, bit, num_keys, P: tl.constexpr):
    """Set a bit for a row's marks above `least` and for `some` of those equal to it, those of the earlier keys."""
    last, end = tl.full((), 0, tl.int32), num_keys - 1
    while last < end:
        middle = between(last, end)
        here = tl.full((), 0, tl.int32)
        for first in range(0, count, P):
            place = first + tl.arange(0, P)
            equal = orders_at(marks, place, place < count) == least
            here += tl.sum((equal & (keys_at(marks, place, equal) <= middle)).to(tl.int32))
        last, end = tl.where(here >= some, last, middle + 1), tl.where(here >= some, middle, end)
    for first in range(0, count, P):
        place = first + tl.arange(0, P)
        order = orders_at(marks, place, place < count)
        key = keys_at(marks, place, order >= least)
        chosen = (order > least) | ((order == least) & (key <= last))
        tl.atomic_or(word_row + key, bit, mask=chosen, sem="relaxed")


@triton.jit
def choose(
    marks, counts, sures, wanted, words, word_stride, states, num_rows, padded, num_keys, room,
    P: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Set the bits of a query's `wanted` best marks where they are all at hand; `states` says whether.

    DONE; or LONG: there are more than P + REST marks; or SHORT: too few, or more than there was room for, or more keys
    are chosen for sure than are wanted. Most queries have no more than P.
    """
    i, batch = tl.program_id(0), tl.program_id(1)
    row = batch.to(tl.int64) * num_rows + i
    list_ = batch.to(tl.int64) * padded + i
    count, want = tl.load(counts + list_), tl.load(wanted + row) - tl.load(sures + list_)
    state = tl.where((count > room) | (count < want) | (want < 0), SHORT, tl.where(count > P + REST, LONG, DONE))
    if (state == DONE) & (want > 0):
        of_row, place, more = marks + 2 * list_ * room, tl.arange(0, P), count > P
        beyond_place = P + tl.arange(0, REST)
        inside, beyond = place < count, beyond_place < count
        order = orders_at(of_row, place, inside)
        rest = tl.full((REST,), -2147483648, tl.int32)
        high = tl.max(order)
        low = tl.min(tl.where(inside, order, high))
        if more:
            rest = orders_at(of_row, beyond_place, beyond)
            high = tl.maximum(high, tl.max(rest))
            low = tl.minimum(low, tl.min(tl.where(beyond, rest, high)))
        # `reached` ≥ want reach `low`; `above` < want exceed `high`, or it is the highest
        reached, above, turn = count, 0, 0
        while (reached > want) & (low < high):
            middle = between_counts(low, high, reached, above, want, turn)
            here = reaching(order, rest, more, middle)
            low, high, reached, above = narrowed(low, high, reached, above, middle, here, want)
            turn += 1
        word_row = words + batch.to(tl.int64) * word_stride + (i // 32).to(tl.int64) * num_keys
        bit = tl.full((), 1, tl.int32) << (i % 32)
        if reached > want:
            set_earlier(of_row, count, low, want - above, word_row, bit, num_keys, REST // 2)
        else:
            key = keys_at(of_row, place, inside & (order >= low))
            tl.atomic_or(word_row + key, bit, mask=inside & (order >= low), sem="relaxed")
            if more:
                rest_key = keys_at(of_row, beyond_place, beyond & (rest >= low))
                tl.atomic_or(word_row + rest_key, bit, mask=beyond & (rest >= low), sem="relaxed")
    tl.store(states + row, state)


@triton.jit
def choose_long(
    marks, counts, sures, wanted, words, word_stride, states, num_rows, padded, num_keys, room,
    ROWS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """`choose` for queries it left LONG, ROWS to a program: any number of marks, P at a time."""
    batch = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * ROWS
    query = first + tl.arange(0, ROWS)
    long = tl.load(states + batch * num_rows + query, mask=query < num_rows, other=DONE) == LONG
    rows = tl.where(tl.max(long.to(tl.int32)) > 0, tl.minimum(num_rows - first, ROWS), 0)
    for j in range(rows):
        i = first + j
        row = batch * num_rows + i
        list_ = batch * padded + i
        count, want = tl.load(counts + list_), tl.load(wanted + row) - tl.load(sures + list_)
        if (tl.load(states + row) == LONG) & (want > 0):
            of_row, place = marks + 2 * list_ * room, tl.arange(0, P)
            low, high = tl.full((), -2147483647, tl.int32), tl.full((), 2147483647, tl.int32)
            reached, above = count, tl.full((), 0, tl.int32)
            while (reached > want) & (low < high):
                middle = between(low, high) + 1
                here = tl.full((), 0, tl.int32)
                for begin in range(0, count, P):
                    order = orders_at(of_row, begin + place, begin + place < count)
                    here += tl.sum((order >= middle).to(tl.int32))
                low, high, reached, above = narrowed(low, high, reached, above, middle, here, want)
            word_row = words + batch * word_stride + (i // 32).to(tl.int64) * num_keys
            bit = tl.full((), 1, tl.int32) << (i % 32)
            # with `reached` of them wanted, as many of those equal to `low` are as there are
            set_earlier(of_row, count, low, tl.where(reached > want, want - above, count), word_row, bit, num_keys, P)


@triton.jit
def single_out(states, places, taken, num_rows, num_places, BLOCK: tl.constexpr):
    """Put queries that are SHORT, while there is room, into `places` [B, `num_places`]; they are DONE for this module.

    `taken` [B], −1 before, is the place taken last.
    """
    batch = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    state = states + batch * num_rows + i
    short = tl.load(state, mask=i < num_rows, other=DONE) == SHORT
    number = tl.sum(short.to(tl.int32))
    if number > 0:
        place = tl.atomic_add(taken + batch, number, sem="relaxed") + tl.cumsum(short.to(tl.int32), 0)
        fits = short & (place < num_places)
        tl.store(places + batch * num_places + place, i, mask=fits)
        tl.store(state, DONE, mask=fits)


@triton.jit
def search(
    q, k, weights, biases, starts, lasts, list_keys, list_words, list_counts, bounds, wanted, words, word_stride,
    states, local, sink, num_rows, num_keys, capacity,
    LISTED: tl.constexpr, KIND: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    RAW: tl.constexpr, FAST: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Set and clear the bits of the queries that are SHORT, from all keys.

    The first two steps look at a query's bound: where many scores are equal, it is mostly these that it lies below.
    Else the k-th is near it: the next steps move away from it, four times as far each time, until the k-th is between.
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
        reached, above = tl.full((M,), 2147483647, tl.int32), tl.zeros((M,), tl.int32)
        bound = tl.load(bounds + row, mask=real, other=0.0)
        guess = tl.where(bound == bound, ordered(bound), 2147483646) + 1
        guess = tl.where(bound == -1e-30, 0, guess)  # what `kernels.scan.bound` gives for 0
        turn = tl.full((), 0, tl.int32)
        while tl.max((short & (reached > want) & (low < high)).to(tl.int32)) > 0:
            middle = between_counts(low, high, reached, above, want, turn)
            away = tl.full((), 1, tl.int64) << tl.minimum(16 + 2 * turn, 32).to(tl.int64)
            middle = tl.where(
                low == -2147483647, tl.maximum(high.to(tl.int64) - away, -2147483646).to(tl.int32), middle
            )
            middle = tl.where(high == 2147483647, tl.minimum(low.to(tl.int64) + away, 2147483647).to(tl.int32), middle)
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
            low, high, reached, above = narrowed(low, high, reached, above, middle, here, want)
        some = tl.where(reached > want, want - above, 2147483647)  # of those equal to `low`
        taken = tl.zeros((M,), tl.int32)
        word_row = words + batch.to(tl.int64) * word_stride + (tile // per_list).to(tl.int64) * num_keys
        value = tl.where(short, tl.full((M,), 1, tl.int32) << bit, 0)
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
            chosen = visible & ((order > low[None, :]) | (tied & (rank <= some[None, :])))
            bits = tl.sum(tl.where(chosen, value[None, :], 0), 1)
            word = tl.load(word_row + key, mask=inside, other=0)  # what `mark` was sure of
            other = (word & tl.sum(value)) ^ bits
            tl.atomic_xor(word_row + key, other, mask=other != 0, sem="relaxed")
