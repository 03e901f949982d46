"""The best keys of queries that see no more keys than a program holds: the way of short sequences.

`kernels.few` writes all scores down. A program holds those of one query in its registers, closes in on the k-th and
writes which keys are chosen, 32 keys to a number; others turn these into words, 32 queries to a number. Against
`kernels.scan` and `kernels.choose` that is three launches in place of nine, no bound that can fail, and no atomic
operation on a bit.

- Floor: a score takes 4 bytes, written once and read once; those of queries that choose all they see are not read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.few import Limits, number, numbers_between, orders_between, ranked
from kernels.scan import ENTROPY, REACHED, VARIANCE
from kernels.scores import (
    FORCED,
    between,
    deviations,
    mean_and_deviation,
    narrowed,
    order_near,
    ordered,
    unordered,
)
from kernels.support import INTERPRET, cdiv, next_power_of_2, tuned

ROOM = 2**14  # scores of a query that a program holds
PAIRS = 2**27  # of queries and keys whose scores exist at one time
CHUNKS = tl.constexpr(2 if INTERPRET else 8)  # of a program's numbers; those without a key that is seen are skipped
CLOSE = tl.constexpr(0.05)  # deviations


def choose_rows(
    values: Tensor, starts: Tensor, lasts: Tensor, wanted: Tensor, limits: Limits, words: Tensor, word_stride: int
) -> None:
    """Write the words [B, ⌈R/32⌉, S] of each query's `wanted` best keys, S ≤ `ROOM`; as `kernels.few.choose_few`."""
    batch, rows, num_keys = values.shape
    bits = torch.empty(batch, rows, cdiv(num_keys, 32), dtype=torch.int32, device=values.device)
    forces = limits.local_window + limits.sink_tokens > 0
    _find[(rows, batch)](
        values, starts, lasts, wanted, *limits, bits, rows, num_keys, FORCES=forces,
        **of_search(num_keys, tuned(values)),
    )  # fmt: skip
    block = 1 if INTERPRET else 32
    _turn[(cdiv(num_keys, 32 * block), cdiv(rows, 32), batch)](
        bits, lasts, words, word_stride, rows, num_keys, BLOCK=block, num_warps=1
    )


def sums_of_rows(
    values: Tensor, starts: Tensor, lasts: Tensor, limits: Limits, kind: int, tau: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """What a controller goes by, [B, R] fp32, and how many keys a query may choose from, [B, R] int32.

    Args:
        values: as of `choose_rows`, and so are `starts`, `lasts` and `limits`.
        kind: of `kernels.scan.SUMS`.
        tau: factor on scores in the softmax whose entropy is taken.
        threshold: scores that reach it are counted.
    """
    batch, rows, num_keys = values.shape
    sums = torch.zeros(batch, rows, dtype=torch.float32, device=values.device)
    numbers = torch.empty(batch, rows, dtype=torch.int32, device=values.device)
    _sums[(rows, batch)](
        values, starts, lasts, limits.local_window, limits.sink_tokens, sums, numbers, tau, threshold, rows, num_keys,
        SUM=kind, **of_sums(num_keys),
    )  # fmt: skip
    return sums, numbers


def of_sums(num_keys: int) -> dict[str, int]:
    """How a program is launched that holds so many numbers: 32 of a thread."""
    p = max(next_power_of_2(num_keys), 64 if INTERPRET else 1024)
    return {"P": p, "num_warps": max(p // 1024, 4), "maxnreg": 128}


def of_search(num_keys: int, tuned: bool) -> dict[str, int]:
    """The same of one that finds. On an H100 four programs of 8192 numbers at a time were fastest, or two of 16,384,
    with 64 of a thread."""
    launch = of_sums(num_keys)
    if not tuned:
        return launch | {"maxnreg": 96}
    return launch | ({"maxnreg": 64} if launch["P"] <= 2**13 else {"num_warps": launch["P"] // 2048})


@triton.jit
def _alive(i, start, last, CHUNK: tl.constexpr):
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
        if _alive(i, start, last, CHUNK):
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
        if _alive(i, start, last, CHUNK):
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
        if _alive(i, start, last, CHUNK):
            least, same = _lesser(least, same, tl.where(orders[i] >= low, orders[i], 2147483647), 1)
    return tl.reduce((least, same), 0, _lesser)


@triton.jit
def _largest(orders, start, last, top):
    """The largest number that does not reach `top`."""
    CHUNK: tl.constexpr = orders[0].shape[0]
    largest = tl.full((CHUNK,), -2147483648, tl.int32)
    for i in tl.static_range(CHUNKS):
        if _alive(i, start, last, CHUNK):
            largest = tl.maximum(largest, tl.where(orders[i] >= top, -2147483648, orders[i]))
    return tl.max(largest)


@triton.jit
def _equals(orders, start, last, least, until):
    """How many numbers are equal to `least`, of keys up to `until`."""
    CHUNK: tl.constexpr = orders[0].shape[0]
    count = tl.zeros((CHUNK,), tl.int32)
    for i in tl.static_range(CHUNKS):
        if _alive(i, start, last, CHUNK):
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


@triton.jit
def _ranked(order, place, first, start, last, local, sink, FORCES: tl.constexpr):
    """`ranked` of the chunk of keys from `first` on; where a query sees all of it and none is forced, it is so."""
    if FORCES or (first < start) | (last < first + place.shape[0] - 1):
        order = ranked(order, place + first, start, last, local, sink, FORCES)
    return order


@triton.jit
def _find(
    values, starts, lasts, wanted, local, sink, k_min, k_max, bits, num_rows, num_keys,
    P: tl.constexpr, FORCES: tl.constexpr,
):  # fmt: skip
    """Which keys each query chooses: bit i of number n says whether it does key 32·n + i."""
    CHUNK: tl.constexpr = P // CHUNKS
    row = tl.program_id(1).to(tl.int64) * num_rows + tl.num_programs(0) - 1 - tl.program_id(0)  # long ones first
    start, last = tl.load(starts + row), tl.load(lasts + row)
    want = number(wanted, starts, lasts, local, sink, k_min, k_max, row)
    least, until = tl.full((), -2147483648, tl.int32), last
    choosy = (want > 0) & (want <= last - start)  # else all are chosen, whatever their scores, or none
    loaded, found = (), ()
    end = tl.where(choosy, last, -1)
    place = tl.arange(0, CHUNK)
    address = values + row * num_keys + place
    for i in tl.static_range(CHUNKS):  # all at once, before the first is looked at
        loaded = loaded + (numbers_between(address + i * CHUNK, place + i * CHUNK, start, end, num_keys),)
    for i in tl.static_range(CHUNKS):
        found = found + (_ranked(loaded[i], place, i * CHUNK, start, last, local, sink, FORCES),)
    if choosy:
        least, until = kth(found, start, last, want, local + sink)
    of_bit = tl.full((1, 32), 1, tl.int32) << tl.arange(0, 32)[None, :]
    numbers = ()
    for i in tl.static_range(CHUNKS):
        of_chunk = tl.zeros((CHUNK // 32,), tl.int32)
        if _alive(i, start, last, CHUNK):
            key = place + i * CHUNK
            if choosy:
                chosen = found[i] >= least
                if until < last:
                    chosen = chosen & ((found[i] > least) | (key <= until))
            else:
                chosen = (key >= start) & (key <= last) & (want > 0)
            of_chunk = tl.sum(tl.where(tl.reshape(chosen, (CHUNK // 32, 32)), of_bit, 0), 1)
        numbers = numbers + (of_chunk,)
    if CHUNKS == 8:
        numbers = _joined(_joined(_joined(numbers, 4), 2), 1)
        together = tl.permute(numbers[0], (1, 2, 3, 0))
    else:
        together = tl.permute(_joined(numbers, 1)[0], (1, 0))
    place, num_words = tl.arange(0, P // 32), (num_keys + 31) // 32
    tl.store(bits + row * num_words + place, tl.reshape(together, (P // 32,)), mask=place < num_words)


@triton.jit
def _joined(tensors, N: tl.constexpr):
    """2N tensors as N that have one dimension more, of two: the first half and the second."""
    found = ()
    for i in tl.static_range(N):
        found = found + (tl.join(tensors[i], tensors[i + N]),)
    return found


@triton.jit
def _exchanged(numbers, D: tl.constexpr, MASK: tl.constexpr):
    """32 numbers, of which bits that MASK says are exchanged with others D lower, of the number D later."""
    found = ()
    for i in tl.static_range(32):
        other = ((numbers[i & ~D] >> D) ^ numbers[i | D]) & MASK
        found = found + (numbers[i] ^ (other if i & D else other << D),)
    return found


@triton.jit
def _turn(bits, lasts, words, word_stride, num_rows, num_keys, BLOCK: tl.constexpr):
    """Words of what `_find` found: squares of 32 bits by 32, turned in a thread's registers."""
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * 32
    begin = tl.program_id(0) * (BLOCK * 32)
    key = begin + tl.arange(0, BLOCK * 32)
    target = words + batch * word_stride + tl.program_id(1).to(tl.int64) * num_keys + key
    rows = batch * num_rows + tl.minimum(first + tl.arange(0, 32), num_rows - 1)
    if begin <= tl.max(tl.load(lasts + rows)):
        place, num_words = begin // 32 + tl.arange(0, BLOCK), (num_keys + 31) // 32
        square = ()
        for i in tl.static_range(32):
            of_query = bits + (batch * num_rows + first + i) * num_words + place
            square = square + (tl.load(of_query, mask=(first + i < num_rows) & (place < num_words), other=0),)
        square = _exchanged(square, 16, 0x0000FFFF)
        square = _exchanged(square, 8, 0x00FF00FF)
        square = _exchanged(square, 4, 0x0F0F0F0F)
        square = _exchanged(square, 2, 0x33333333)
        square = _exchanged(square, 1, 0x55555555)
        square = _joined(_joined(_joined(_joined(_joined(square, 16), 8), 4), 2), 1)
        tl.store(target, tl.reshape(square[0], (BLOCK * 32,)), mask=key < num_keys)
    else:
        tl.store(target, tl.zeros((BLOCK * 32,), tl.int32), mask=key < num_keys)


@triton.jit
def _sums(
    values, starts, lasts, local, sink, sums, numbers, tau, threshold, num_rows, num_keys,
    SUM: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * num_rows + tl.program_id(0)
    key = tl.arange(0, P)
    start, last = tl.load(starts + row), tl.load(lasts + row)
    order = orders_between(values + row * num_keys, start, last, 0, 0, key, num_keys, False)
    seen = order != -2147483648
    count = tl.sum(seen.to(tl.int32))
    tl.store(numbers + row, count)
    score = unordered(order)
    if SUM == VARIANCE:
        number = tl.maximum(count, 1).to(tl.float32)
        mean = tl.sum(tl.where(seen, score, 0.0)) / number
        tl.store(sums + row, tl.sum(tl.where(seen, (score - mean) * (score - mean), 0.0)) / number)
    if SUM == ENTROPY:
        logits = tl.where(seen, tau * score, float("-inf"))
        below = tl.where(seen, logits - tl.max(logits), 0.0)
        p = tl.where(seen, tl.exp(below), 0.0)
        total = tl.maximum(tl.sum(p), 1e-30)
        tl.store(sums + row, tl.where(count > 0, tl.log(total) - tl.sum(p * below) / total, 0.0))
    if SUM == REACHED:
        reached = (score >= threshold) | (key > last - local) | (key < start + sink)
        tl.store(sums + row, tl.sum((reached & seen).to(tl.float32)))
