"""The k-th largest of the numbers of one query, which a program holds in its registers, a chunk after the other.

Passes over all numbers count how many reach two thresholds, which close in on the k-th from both sides.
"""

import triton
import triton.language as tl

from kernels.scores import FORCED, between, deviations, mean_and_deviation, narrowed, order_near, ordered, unordered
from kernels.support import INTERPRET

CHUNKS = tl.constexpr(2 if INTERPRET else 8)  # of a program's numbers; those without a key that is seen are skipped
CLOSE = tl.constexpr(0.05)  # deviations from where the k-th is guessed to the first two thresholds


@triton.jit
def alive(i, start, last, CHUNK: tl.constexpr):
    """Whether any key that a query sees is in its chunk i."""
    return (i * CHUNK <= last) & (start < (i + 1) * CHUNK)


@triton.jit
def _both(s, q, s_, q_):
    return s + s_, q + q_


@triton.jit
def _guesses(orders, start, last, above, want):
    """Two numbers between which the `want`-th largest is, where scores are spread as normal ones are.

    `above` of the largest are left out, which would mislead as forced keys do; mean and deviation are those of every
    fourth number.
    """
    CHUNK: tl.constexpr = orders[0].shape[0]
    top = ordered(tl.full((), FORCED, tl.float32))
    total, squares = tl.zeros((CHUNK // 4,), tl.float32), tl.zeros((CHUNK // 4,), tl.float32)
    for i in tl.static_range(CHUNKS):
        if alive(i, start, last, CHUNK):
            half, _ = tl.split(tl.reshape(orders[i], (CHUNK // 2, 2)))
            some, _ = tl.split(tl.reshape(half, (CHUNK // 4, 2)))
            score = tl.where((some != -2147483648) & (some < top), unordered(some), 0.0)
            total += score
            squares += score * score
    total, squares = tl.reduce((total, squares), 0, _both)
    number, mean, deviation = mean_and_deviation((last + 1 - start - above) // 4, total, squares)
    z = deviations((want - above).to(tl.float32) / (4 * number))
    low, high = order_near(mean + deviation * (z - CLOSE)), order_near(mean + deviation * (z + CLOSE))
    return tl.minimum(tl.minimum(low, high), top), tl.minimum(tl.maximum(low, high), top)


@triton.jit
def _reach(orders, start, last, low, high):
    """How many numbers reach each of two.

    Floats count, as units that do not compare add them: of 5 integer operations a number, 2 are left. From 2²³ on their
    bits are those of the integers in them.
    """
    CHUNK: tl.constexpr = orders[0].shape[0]
    counts = tl.full((CHUNK,), 8388608.0, tl.float32)
    for i in tl.static_range(CHUNKS):
        if alive(i, start, last, CHUNK):
            counts = tl.where(orders[i] >= low, counts + 1, counts)
            counts = tl.where(orders[i] >= high, counts + 65536, counts)
    both = tl.sum(counts.to(tl.int32, bitcast=True) - 0x4B000000)
    return both & 65535, both >> 16


@triton.jit
def _lesser(a, n, b, m):
    return tl.minimum(a, b), tl.where(a < b, n, tl.where(b < a, m, n + m))


@triton.jit
def _least(orders, start, last, low):
    """The least number that reaches `low`, and how many are equal to it."""
    CHUNK: tl.constexpr = orders[0].shape[0]
    least, same = tl.full((CHUNK,), 2147483647, tl.int32), tl.zeros((CHUNK,), tl.int32)
    for i in tl.static_range(CHUNKS):
        if alive(i, start, last, CHUNK):
            least, same = _lesser(least, same, tl.where(orders[i] >= low, orders[i], 2147483647), 1)
    return tl.reduce((least, same), 0, _lesser)


@triton.jit
def _largest(orders, start, last, top):
    """The largest number that does not reach `top`."""
    CHUNK: tl.constexpr = orders[0].shape[0]
    largest = tl.full((CHUNK,), -2147483648, tl.int32)
    for i in tl.static_range(CHUNKS):
        if alive(i, start, last, CHUNK):
            largest = tl.maximum(largest, tl.where(orders[i] >= top, -2147483648, orders[i]))
    return tl.max(largest)


@triton.jit
def _equals(orders, start, last, least, until):
    """How many numbers are equal to `least`, of keys up to `until`."""
    CHUNK: tl.constexpr = orders[0].shape[0]
    count = tl.zeros((CHUNK,), tl.int32)
    for i in tl.static_range(CHUNKS):
        if alive(i, start, last, CHUNK):
            key = i * CHUNK + tl.arange(0, CHUNK)
            count += ((orders[i] == least) & (key <= until)).to(tl.int32)
    return tl.sum(count)


@triton.jit
def kth(orders, start, last, want, above):
    """The `want`-th largest of the numbers, of which there are at least so many above −2³¹, and the last key of those
    equal to it that belong to the `want` largest.

    Two guesses enclose it in most rows. What is between is searched by two numbers at a time, close to each other on
    the straight line along which a smooth tail nearly lies, and by bisection every third time: no scores take more than
    three times as long as by bisection alone. A last one too many is dropped.
    """
    top = ordered(tl.full((), FORCED, tl.float32))
    low, high = _guesses(orders, start, last, above, want)
    reached, above = _reach(orders, start, last, low, high)
    if (reached < want) | (above >= want):
        if reached < want:
            high, above = low - 1, reached
            low, _ = _least(orders, start, last, -2147483647)
            reached, _ = _reach(orders, start, last, low, low)
        else:
            low, reached = high, above
            above, _ = _reach(orders, start, last, top, top)
            high = _largest(orders, start, last, top)
            if above >= want:  # more than are wanted are forced or not finite
                low, high, reached, above = top, tl.full((), 2147483647, tl.int32), above, tl.full((), 0, tl.int32)
    else:
        high -= 1
    turn = tl.full((), 0, tl.int32)
    while (reached > want) & (low < high):
        if reached - want == 1:
            least, same = _least(orders, start, last, low)
            enough = same > reached - want
            low, high = tl.where(enough, least, least + 1), tl.where(enough, least, high)
            reached, above = tl.where(enough, reached, reached - same), tl.where(enough, reached - same, above)
        else:
            root = tl.rsqrt((reached - above).to(tl.float32))
            share = (reached - want).to(tl.float32) * root * root
            away = 0.8 * tl.sqrt(share * (1 - share)) * root + 0.2 * root * root
            begin, length = unordered(low), unordered(high) - unordered(low)
            first, second = order_near(begin + length * (share - away)), order_near(begin + length * (share + away))
            middle = between(low, high) + 1
            first, second = tl.where(turn % 3 == 2, middle, first), tl.where(turn % 3 == 2, middle, second)
            first = tl.minimum(tl.maximum(first, low + 1), high)
            second = tl.minimum(tl.maximum(second, first), high)
            reach, reach_second = _reach(orders, start, last, first, second)
            low, high, reached, above = narrowed(low, high, reached, above, first, reach, want)
            if reach >= want:
                low, high, reached, above = narrowed(low, high, reached, above, second, reach_second, want)
            turn += 1
    until = last
    if reached > want:  # of those equal to it there is room for the earliest
        end, until = last, start
        while until < end:
            middle = between(until, end)
            enough = _equals(orders, start, last, low, middle) >= want - above
            until, end = tl.where(enough, until, middle + 1), tl.where(enough, middle, end)
    return low, until
