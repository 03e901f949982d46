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

from kernels.few import Limits, number, orders
from kernels.scan import ENTROPY, REACHED, VARIANCE
from kernels.scores import FORCED, between, deviations, narrowed, ordered, unordered
from kernels.support import INTERPRET, cdiv, next_power_of_2, tuned

ROOM = 2**13  # scores of a query that a program holds
REGISTERS = (96, 64)  # of a thread that finds, and on sm_90: four programs of 8192 at a time, as was fastest on an H100
PAIRS = 2**28  # of queries and keys whose scores exist at one time
LEVELS = tl.constexpr(2)
CLOSE = tl.constexpr(0.05)  # deviations


def choose_rows(
    values: Tensor, starts: Tensor, lasts: Tensor, wanted: Tensor, limits: Limits, words: Tensor, word_stride: int
) -> None:
    """Write the words [B, ⌈R/32⌉, S] of each query's `wanted` best keys, S ≤ `ROOM`; as `kernels.few.choose_few`."""
    batch, rows, num_keys = values.shape
    bits = torch.empty(batch, rows, cdiv(num_keys, 32), dtype=torch.int32, device=values.device)
    _find[(rows, batch)](
        values, starts, lasts, wanted, *limits, bits, rows, num_keys, maxnreg=REGISTERS[tuned(values)],
        FORCES=limits.local_window + limits.sink_tokens > 0, **of_program(num_keys),
    )  # fmt: skip
    block = 16 if INTERPRET else 256
    _turn[(cdiv(num_keys, block), cdiv(rows, 32), batch)](
        bits, lasts, words, word_stride, rows, num_keys, BLOCK=block, num_warps=4
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
        SUM=kind, **of_program(num_keys),
    )  # fmt: skip
    return sums, numbers


def of_program(num_keys: int) -> dict[str, int]:
    """How a program is launched that holds so many numbers: 32 of a thread."""
    p = max(next_power_of_2(num_keys), 64 if INTERPRET else 1024)
    return {"P": p, "num_warps": max(p // 1024, 4)}


@triton.jit
def _sums_of_two(n, s, q, n_, s_, q_):
    return n + n_, s + s_, q + q_


@triton.jit
def _guesses(order, above, want):
    """Two numbers between which the `want`-th largest is, where scores are spread as normal ones are.

    `above` of the largest are left out, which would mislead as forced keys do; mean and deviation are those of every
    fourth number.
    """
    P: tl.constexpr = order.shape[0]
    half, _ = tl.split(tl.reshape(order, (P // 2, 2)))
    some, _ = tl.split(tl.reshape(half, (P // 4, 2)))
    top = ordered(tl.full((), FORCED, tl.float32))
    free = (some != -2147483648) & (some < top)
    score = tl.where(free, unordered(some), 0.0)
    count, total, squares = tl.reduce((free.to(tl.int32), score, score * score), 0, _sums_of_two)
    count = tl.maximum(count, 1).to(tl.float32)
    mean = total / count
    deviation = tl.sqrt(tl.maximum(squares / count - mean * mean, 0.0))
    z = deviations((want - above).to(tl.float32) / (4 * count))
    low, high = ordered(mean + deviation * (z - CLOSE)), ordered(mean + deviation * (z + CLOSE))  # NaN is above all
    return tl.minimum(tl.minimum(low, high), top), tl.minimum(high, top)


@triton.jit
def _reach(order, low, high):
    """How many numbers reach each of two."""
    both = tl.sum((order >= low).to(tl.int32) + ((order >= high).to(tl.int32) << 16))
    return both & 65535, both >> 16


@triton.jit
def _lesser(a, n, b, m):
    return tl.minimum(a, b), tl.where(a < b, n, tl.where(b < a, m, n + m))


@triton.jit
def best_of(order, want, above, key):
    """Which of the numbers [P] are the `want` largest, at least one and no more than there are above −2³¹; of those
    equal to the least of them, the earliest.

    Two guesses enclose it in most rows. What is between is searched by two numbers at a time, close to each other on
    the straight line along which a smooth tail nearly lies, and by bisection every third time: no scores take more than
    three times as long as by bisection alone. The last ones too many are dropped one by one.
    """
    top = ordered(tl.full((), FORCED, tl.float32))
    low, high = _guesses(order, above, want)
    reached, above = _reach(order, low, high)
    if (reached < want) | (above >= want):
        if reached < want:
            high, above = low - 1, reached
            low = tl.min(tl.where(order == -2147483648, 2147483647, order))
            reached = tl.sum((order != -2147483648).to(tl.int32))
        else:
            low, reached = high, above
            above = tl.sum((order >= top).to(tl.int32))
            high = tl.max(tl.where(order >= top, -2147483648, order))
            if above >= want:  # more than are wanted are forced or not finite
                low, high, reached, above = top, tl.full((), 2147483647, tl.int32), above, tl.full((), 0, tl.int32)
    else:
        high -= 1
    turn = tl.full((), 0, tl.int32)
    while (reached > want) & (low < high):
        if reached - want <= 2:
            of_least = (tl.where(order >= low, order, 2147483647), tl.full(order.shape, 1, tl.int32))
            least, same = tl.reduce(of_least, 0, _lesser)
            enough = same > reached - want
            low, high = tl.where(enough, least, least + 1), tl.where(enough, least, high)
            reached, above = tl.where(enough, reached, reached - same), tl.where(enough, reached - same, above)
        else:
            between_them = (reached - above).to(tl.float32)
            share = (reached - want).to(tl.float32) / between_them
            away = 1.2 * tl.sqrt(share * (1 - share) / between_them) + 0.5 / between_them
            begin, length = unordered(low), unordered(high) - unordered(low)
            first, second = ordered(begin + length * (share - away)), ordered(begin + length * (share + away))
            middle = between(low, high) + 1
            first, second = tl.where(turn % 3 == 2, middle, first), tl.where(turn % 3 == 2, middle, second)
            first = tl.minimum(tl.maximum(first, low + 1), high)
            second = tl.minimum(tl.maximum(second, first), high)
            reach, reach_second = _reach(order, first, second)
            low, high, reached, above = narrowed(low, high, reached, above, first, reach, want)
            if reach >= want:
                low, high, reached, above = narrowed(low, high, reached, above, second, reach_second, want)
            turn += 1
    if reached > want:  # of those equal to the least there is room for the earliest
        until, end = tl.full((), 0, tl.int32), tl.max(key)
        while until < end:
            middle = between(until, end)
            here = tl.sum(((order == low) & (key <= middle)).to(tl.int32))
            enough = here >= want - above
            until, end = tl.where(enough, until, middle + 1), tl.where(enough, middle, end)
        order = tl.where((order == low) & (key > until), -2147483648, order)
    return order >= low


@triton.jit
def _find(
    values, starts, lasts, wanted, local, sink, k_min, k_max, bits, num_rows, num_keys,
    P: tl.constexpr, FORCES: tl.constexpr,
):  # fmt: skip
    """Which keys each query chooses: bit i of number n says whether it does key 32·n + i. Later numbers than the one of
    its last key are not written."""
    row = tl.program_id(1).to(tl.int64) * num_rows + tl.num_programs(0) - 1 - tl.program_id(0)  # long ones first
    last = tl.load(lasts + row)
    for level in tl.static_range(LEVELS):  # no more numbers are held than halve as many would do
        fits = (last >= P >> level + 1) & (last < P >> level)
        if level == LEVELS - 1:
            fits = last < P >> level
        if fits:
            _find_among(
                values, starts, lasts, wanted, local, sink, k_min, k_max, bits, row, num_keys, P >> level, FORCES
            )  # fmt: skip


@triton.jit
def _find_among(
    values, starts, lasts, wanted, local, sink, k_min, k_max, bits, row, num_keys, P: tl.constexpr, FORCES: tl.constexpr
):  # fmt: skip
    key = tl.arange(0, P)
    start, last = tl.load(starts + row), tl.load(lasts + row)
    want = number(wanted, starts, lasts, local, sink, k_min, k_max, row)
    chosen = (key >= start) & (key <= last) & (want > 0)
    if (want > 0) & (want <= last - start):  # else all are chosen, whatever their scores
        order = orders(values, starts, lasts, local, sink, row, row, key, num_keys, FORCES)
        chosen = best_of(order, want, local + sink, key)
    of_bit = tl.full((1, 32), 1, tl.int32) << tl.arange(0, 32)[None, :]
    word = tl.sum(tl.where(tl.reshape(chosen, (P // 32, 32)), of_bit, 0), 1)
    place = tl.arange(0, P // 32)
    num_words = (num_keys + 31) // 32
    tl.store(bits + row * num_words + place, word, mask=place < num_words)


@triton.jit
def _turn(bits, lasts, words, word_stride, num_rows, num_keys, BLOCK: tl.constexpr):
    """Words of what `_find` found."""
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * 32
    key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = batch * num_rows + tl.minimum(first + tl.arange(0, 32), num_rows - 1)
    word = tl.zeros((BLOCK,), tl.int32)
    num_words = (num_keys + 31) // 32
    if tl.program_id(0) * BLOCK <= tl.max(tl.load(lasts + rows)):
        for i in tl.static_range(32):
            row = batch * num_rows + first + i
            last = tl.load(lasts + row, mask=first + i < num_rows, other=-1)
            of_query = tl.load(bits + row * num_words + key // 32, mask=key <= last, other=0)
            word = word | (((of_query >> (key % 32)) & 1) << i)
    target = words + batch * word_stride + tl.program_id(1).to(tl.int64) * num_keys + key
    tl.store(target, word, mask=key < num_keys)


@triton.jit
def _sums(
    values, starts, lasts, local, sink, sums, numbers, tau, threshold, num_rows, num_keys,
    SUM: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * num_rows + tl.program_id(0)
    key = tl.arange(0, P)
    order = orders(values, starts, lasts, 0, 0, row, row, key, num_keys, False)
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
        start, last = tl.load(starts + row), tl.load(lasts + row)
        reached = (score >= threshold) | (key > last - local) | (key < start + sink)
        tl.store(sums + row, tl.sum((reached & seen).to(tl.float32)))
