"""The best keys of queries that see no more keys than a program holds: the way of short sequences.

`kernels.few` writes all scores down. A program holds those of one query in its registers and closes in on the k-th;
others then compare 32 queries' scores with theirs and write the words. Against `kernels.scan` and `kernels.choose` that
is three launches in place of nine, no bound that can fail, and no atomic operation on a bit.

- Floor: a score takes 4 bytes, written once and read twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.few import Limits, number, orders
from kernels.scan import ENTROPY, REACHED, VARIANCE
from kernels.scores import FORCED, between, deviations, moments, narrowed, ordered, unordered
from kernels.support import INTERPRET, cdiv, next_power_of_2, tuned

ROOM = 2**13  # scores of a query that a program holds
REGISTERS = (96, 64)  # of a thread that finds, and on sm_90: four programs of 8192 at a time, as was fastest on an H100
PAIRS = 2**28  # of queries and keys whose scores exist at one time


def choose_rows(
    values: Tensor, starts: Tensor, lasts: Tensor, wanted: Tensor, limits: Limits, words: Tensor, word_stride: int
) -> None:
    """Write the words [B, ⌈R/32⌉, S] of each query's `wanted` best keys, S ≤ `ROOM`; as `kernels.few.choose_few`."""
    batch, rows, num_keys = values.shape
    least, until = torch.empty(2, batch, rows, dtype=torch.int32, device=values.device)
    _find[(rows, batch)](
        values, starts, lasts, wanted, *limits, least, until, rows, num_keys, maxnreg=REGISTERS[tuned(values)],
        **of_program(num_keys),
    )  # fmt: skip
    block = 16 if INTERPRET else 256
    _write[(cdiv(num_keys, block), cdiv(rows, 32), batch)](
        values, starts, lasts, *limits[:2], least, until, words, word_stride, rows, num_keys, BLOCK=block, num_warps=8
    )  # fmt: skip


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
def kth(order, want, key, num_keys):
    """The `want`-th largest number, and the last key of those equal to it that belong to the `want` largest.

    Where scores are spread as normal ones are, two guesses enclose it; what is between is searched along a straight
    line, and by bisection every third time: no scores take more than three times as long as by bisection alone.
    """
    least, until = tl.full((), -2147483647, tl.int32), num_keys
    top = ordered(tl.full((), FORCED, tl.float32))
    free = (order != -2147483648) & (order < top)  # forced keys and what is not finite would mislead the guesses
    count, mean, deviation, low, high = moments(order, free)
    above = tl.sum((order >= top).to(tl.int32))
    reached = count + above
    if reached > want:
        z = deviations((want - above).to(tl.float32) / tl.maximum(count, 1).to(tl.float32))
        if above >= want:  # more than are wanted are forced or not finite
            low, high, reached, above = top, tl.full((), 2147483647, tl.int32), above, tl.full((), 0, tl.int32)
        turn = tl.full((), 0, tl.int32)
        while (reached > want) & (low < high):
            share = (reached - want).to(tl.float32) / tl.maximum(reached - above, 1).to(tl.float32)
            guess = unordered(low) + (unordered(high) - unordered(low)) * share
            guess = tl.where(turn < 2, mean + deviation * (z + tl.where(turn == 0, -0.02, 0.02)), guess)
            middle = tl.where((turn > 2) & (turn % 3 == 0), between(low, high) + 1, ordered(guess))
            middle = tl.minimum(tl.maximum(middle, low + 1), high)
            here = tl.sum((order >= middle).to(tl.int32))
            low, high, reached, above = narrowed(low, high, reached, above, middle, here, want)
            turn += 1
        least = low
        if reached > want:
            until, end = tl.full((), 0, tl.int32), num_keys - 1
            while until < end:
                middle = between(until, end)
                here = tl.sum(((order == least) & (key <= middle)).to(tl.int32))
                enough = here >= want - above
                until, end = tl.where(enough, until, middle + 1), tl.where(enough, middle, end)
    return least, until


@triton.jit
def _find(
    values, starts, lasts, wanted, local, sink, k_min, k_max, least, until, num_rows, num_keys, P: tl.constexpr
):  # fmt: skip
    """The least number that each query chooses, and the last key of those whose number is that."""
    row = tl.program_id(1).to(tl.int64) * num_rows + tl.num_programs(0) - 1 - tl.program_id(0)  # long ones first
    want = number(wanted, starts, lasts, local, sink, k_min, k_max, row)
    found, last = tl.full((), 2147483647, tl.int32), tl.full((), -1, tl.int32)
    if want > 0:
        key = tl.arange(0, P)
        found, last = kth(orders(values, starts, lasts, local, sink, row, row, key, num_keys), want, key, num_keys)
    tl.store(least + row, found)
    tl.store(until + row, last)


@triton.jit
def _write(
    values, starts, lasts, local, sink, least, until, words, word_stride, num_rows, num_keys, BLOCK: tl.constexpr
):  # fmt: skip
    """Words of what `_find` found."""
    batch = tl.program_id(2).to(tl.int64)
    i, key = tl.arange(0, 32), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    query = tl.program_id(1) * 32 + i
    row = batch * num_rows + tl.minimum(query, num_rows - 1)
    word = tl.zeros((BLOCK,), tl.int32)
    if tl.program_id(0) * BLOCK <= tl.max(tl.load(lasts + row)):
        at = row[:, None]
        order = orders(values, starts, lasts, local, sink, at, at, key[None, :], num_keys)
        found, ties = tl.load(least + row)[:, None], tl.load(until + row)[:, None]
        chosen = ((order > found) | ((order == found) & (key <= ties))) & (order != -2147483648)
        chosen = chosen & (query < num_rows)[:, None]
        word = tl.sum(chosen.to(tl.int32) << i[:, None], 0)
    target = words + batch * word_stride + tl.program_id(1).to(tl.int64) * num_keys + key
    tl.store(target, word, mask=key < num_keys)


@triton.jit
def _sums(
    values, starts, lasts, local, sink, sums, numbers, tau, threshold, num_rows, num_keys,
    SUM: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * num_rows + tl.program_id(0)
    key = tl.arange(0, P)
    order = orders(values, starts, lasts, 0, 0, row, row, key, num_keys)
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
