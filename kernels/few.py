"""The best keys of a few queries, as in decoding: no time to lose on one query, so that all of the GPU works on it.

The few are all queries that there are, or those of many that `places` [B, N] int32 names, with −1 where it names none.

S scores of a query are written, as `ordered` numbers, and the k-th of them is found digit by digit: a histogram of the
first 8 bits says which bin it is in, one of the next 8 bits within that bin which bin there, and so on. Everything runs
on the GPU, and shapes do not depend on what is found: a CUDA graph can hold it.

- Floor: the indexer keys are read once, S·d_I·2 bytes; scores, 4 bytes each, are written once and read five times.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.scores import FORCED, number_kept, of_queries, ordered, score_block
from kernels.support import cdiv, tuned

FEW = 16  # queries of a row, at most
MANY = 64  # queries that a program scores where they are more
BLOCKS = 4  # of keys that a program scores
DIGITS, BINS = 4, 256  # of 8 bits; Triton's histograms slow down with the number of bins
BLOCK = 4096  # scores of a program
NOT_VISIBLE = -(2**31)


class Limits(NamedTuple):
    """Keys that queries must choose, the last and the first that they see, and between what their numbers must be."""

    local_window: int
    sink_tokens: int
    k_min: int
    k_max: int


def unordered(values: Tensor) -> Tensor:
    """The fp32 scores whose `ordered` numbers these are."""
    return (values ^ ((values >> 31) & 0x7FFFFFFF)).view(torch.float32)


def scores_of_few(
    inputs: tuple[Tensor, ...],
    open_: Tensor | None,
    shape: dict[str, int | bool],
    places: Tensor | None = None,
    many: bool = False,
) -> Tensor:
    """`ordered` scores [B, N, S] int32 of N of R queries; `NOT_VISIBLE` where `open_` does not let one choose a key.

    What lies before a query's first key or after its last is unspecified.

    Args:
        inputs: `kernels.task.inputs_of`.
        open_: words [B, ⌈R/32⌉, S]; `None`: all keys are open.
        shape: what the code depends on.
        places: which queries; `None`: all R.
        many: whether N is large, and programs take many queries.
    """
    q, k = inputs[:2]
    batch, rows, num_keys = q.shape[0], q.shape[1], k.shape[1]
    few = rows if places is None else places.shape[1]
    values = torch.empty(batch, few, num_keys, dtype=torch.int32, device=q.device)
    meta: dict[str, int | bool] = {"M": FEW, "num_warps": 4, "num_stages": 3} | shape
    if many:
        meta |= {"M": MANY, "num_warps": 8, "num_stages": 2}
        several = 64 if tuned(q) else 32  # or registers do not suffice
        meta["N"] = min(shape["N"], 128 if shape["HEADS"] == 1 else several)
    grid = (cdiv(num_keys, BLOCKS * meta["N"]), cdiv(few, meta["M"]), batch)
    _score[grid](
        *inputs, values if open_ is None else open_, values, values if places is None else places, few, rows, num_keys,
        OPEN=open_ is None, SOME=places is not None, BLOCKS=BLOCKS, **meta,
    )  # fmt: skip
    return values


def choose_few(
    values: Tensor, starts: Tensor, lasts: Tensor, wanted: Tensor, limits: Limits, words: Tensor, word_stride: int,
    places: Tensor | None = None,
) -> None:  # fmt: skip
    """Set the bits of each of the few's `wanted` [B, R] best keys in `words` [B, ⌈R/32⌉, S], and clear their others.

    Args:
        values: [B, N, S] int32, `scores_of_few`.
        starts: [B, R] int32, the first key that a query sees.
        lasts: [B, R] int32, and the last.
        wanted: [B, R] int32; as many are chosen, within the limits, and no more than a query sees.
        limits: see there.
        words: see there.
        word_stride: from one row of the batch to the next.
        places: which queries; `None`: all R.
    """
    batch, few, num_keys = values.shape
    counts = torch.zeros(batch, few, DIGITS, BINS, dtype=torch.int32, device=values.device)
    grid = (cdiv(num_keys, BLOCK), few, batch)
    common = (values, starts, lasts, wanted, values if places is None else places, *limits, counts)
    constants = {"SOME": places is not None, "DIGITS": DIGITS, "BLOCK": BLOCK, "BINS": BINS}
    for digit in range(DIGITS):
        _count[grid](*common, starts.shape[1], num_keys, DIGIT=digit, num_warps=8, **constants)
    registers = {"num_warps": 8, "maxnreg": 96}  # ptxas then makes do with 84; left to itself it spills some at 80
    _set[grid](*common, words, word_stride, starts.shape[1], num_keys, **registers, **constants)


@triton.jit
def _score(
    q, k, weights, biases, starts, lasts, open_words, values, places, few, num_rows, num_keys,
    OPEN: tl.constexpr, SOME: tl.constexpr, KIND: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    RAW: tl.constexpr, FAST: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    i = tl.program_id(1) * M + tl.arange(0, M)
    slot, real = batch * few + i, i < few
    if SOME:
        i = tl.load(places + slot, mask=real, other=-1)
        real = i >= 0
    row = batch * num_rows + i
    last = tl.load(lasts + row, mask=real, other=-1)
    end = tl.minimum(tl.max(last) + 1, num_keys)
    first = tl.program_id(0) * (BLOCKS * N)
    if first < end:
        queries, gates, offsets = of_queries(q, weights, biases, row, real, KIND, HEADS, D, DP, RAW, FAST)
        for at in range(first, tl.minimum(first + BLOCKS * N, end), N):
            key = at + tl.arange(0, N)
            inside = key < end
            _, scores, _ = score_block(
                key, inside, k, queries, gates, offsets, open_words, open_words, 0, i, batch, num_keys,
                False, KIND, HEADS, D, DP, RAW, FAST,
            )  # fmt: skip
            order = ordered(tl.trans(scores))
            if not OPEN:
                write = real[:, None] & inside[None, :]
                word_row = batch * ((num_rows + 31) // 32) + i // 32
                word = tl.load(open_words + word_row[:, None] * num_keys + key[None, :], mask=write, other=0)
                order = tl.where(((word >> (i % 32)[:, None]) & 1) != 0, order, -2147483648)
            write = real[:, None] & (key < num_keys)[None, :]  # also a little after the last key: 16 bytes at once
            tl.store(values + slot[:, None] * num_keys + key[None, :], order, mask=write)


@triton.jit
def query_of(places, lasts, num_rows, SOME: tl.constexpr):
    """Which of the few a program works for, its place and row among all queries, and its last key, or −1."""
    batch = tl.program_id(2).to(tl.int64)
    i = tl.program_id(1)
    slot = batch * tl.num_programs(1) + i
    if SOME:
        i = tl.load(places + slot)
    row = batch * num_rows + tl.maximum(i, 0)
    return slot, i, row, tl.load(lasts + row, mask=i >= 0, other=-1)


@triton.jit
def orders(values, starts, lasts, local, sink, slot, row, key, num_keys):
    """`ordered` scores of a query's keys, those that it does not see −2³¹, and forced ones highest.

    Or of several queries', whose `slot` and `row` are [N, 1], with keys [1, S].
    """
    start, last = tl.load(starts + row), tl.load(lasts + row)
    return orders_between(values + slot * num_keys, start, last, local, sink, key, num_keys, True)


@triton.jit
def orders_between(values, start, last, local, sink, key, num_keys, FORCES: tl.constexpr):
    """The same of what is at `values`, from the first key that a query sees to the last; FORCES: any may be forced."""
    numbers = numbers_between(values + key, key, start, last, num_keys)
    return ranked(numbers, key, start, last, local, sink, FORCES)


@triton.jit
def numbers_between(address, key, start, last, num_keys):
    """What is at `address` of keys from the first that a query sees to the last, and anything for other keys."""
    near = (key >= start // 16 * 16) & (key < (last // 16 + 1) * 16) & (key < num_keys)  # 16 bytes are loaded at once
    return tl.load(address, mask=near)


@triton.jit
def ranked(order, key, start, last, local, sink, FORCES: tl.constexpr):
    """`numbers_between` with keys that the query does not see lowest and, with FORCES, forced ones highest."""
    order = tl.where((key >= start) & (key <= last), order, -2147483648)
    if FORCES:
        forced = (key > last - local) | (key < start + sink)
        highest = ordered(tl.full(key.shape, FORCED, tl.float32))
        order = tl.where(forced & (order != -2147483648), highest, order)
    return order


@triton.jit
def number(wanted, starts, lasts, local, sink, k_min, k_max, row):
    """How many keys a query chooses."""
    available = tl.maximum(tl.load(lasts + row) - tl.load(starts + row) + 1, 0)
    return number_kept(tl.load(wanted + row), available, local, sink, k_min, k_max)


@triton.jit
def digit_of(order, DIGIT: tl.constexpr):
    """A digit of numbers counted from the least that there is, the first of them being the highest."""
    return ((order ^ -2147483648) >> (24 - 8 * DIGIT)) & 255


@triton.jit
def found(counts, row, want, DIGIT: tl.constexpr, DIGITS: tl.constexpr, BINS: tl.constexpr):
    """A digit of the `want`-th largest number, which one of those that share it the number is, and how many do."""
    bins = tl.arange(0, BINS)
    count = tl.load(counts + (row * DIGITS + DIGIT) * BINS + bins)
    reached = tl.sum(count) - tl.cumsum(count, 0) + count  # how many have this digit or a larger one
    digit = tl.sum((reached >= want).to(tl.int32)) - 1
    above = tl.sum(tl.where(bins > digit, count, 0))
    return digit, want - above, tl.sum(tl.where(bins == digit, count, 0))


@triton.jit
def _count(
    values, starts, lasts, wanted, places, local, sink, k_min, k_max, counts, num_rows, num_keys,
    SOME: tl.constexpr, DIGIT: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Histogram of one digit, over the numbers whose earlier digits are those of the wanted one."""
    slot, i, row, end = query_of(places, lasts, num_rows, SOME)
    key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK <= end:
        order = orders(values, starts, lasts, local, sink, slot, row, key, num_keys)
        here = order != -2147483648
        want = number(wanted, starts, lasts, local, sink, k_min, k_max, row)
        for digit in tl.static_range(DIGIT):
            mine, want, _ = found(counts, slot, want, digit, DIGITS, BINS)
            here = here & (digit_of(order, digit) == mine)
        histogram = tl.histogram(digit_of(order, DIGIT), BINS, here)
        target = counts + (slot * DIGITS + DIGIT) * BINS + tl.arange(0, BINS)
        tl.atomic_add(target, histogram, mask=histogram > 0, sem="relaxed")


@triton.jit
def _set(
    values, starts, lasts, wanted, places, local, sink, k_min, k_max, counts, words, word_stride, num_rows, num_keys,
    SOME: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Bits of the numbers above the wanted one, and of those equal to it the earliest as long as there is room.

    Where SOME are of many, bits may be set that are not theirs; those of keys that they do not see are not."""
    slot, i, row, end = query_of(places, lasts, num_rows, SOME)
    want = number(wanted, starts, lasts, local, sink, k_min, k_max, row)
    first = tl.program_id(0) * BLOCK
    if (first <= end) & (want > 0):
        least = tl.full((), 0, tl.int32)
        equals = tl.full((), 0, tl.int32)
        for digit in tl.static_range(DIGITS):
            mine, want, equals = found(counts, slot, want, digit, DIGITS, BINS)
            least = (least << 8) | mine
        least = least ^ -2147483648
        key = first + tl.arange(0, BLOCK)
        order = orders(values, starts, lasts, local, sink, slot, row, key, num_keys)
        equal = order == least
        if equals > want:  # then earlier blocks may have taken some
            for at in range(0, first, BLOCK):
                earlier = orders(values, starts, lasts, local, sink, slot, row, at + tl.arange(0, BLOCK), num_keys)
                want -= tl.sum((earlier == least).to(tl.int32))
        chosen = (order > least) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= want))
        bit = tl.full((BLOCK,), 1, tl.int32) << (i % 32)
        word = words + tl.program_id(2).to(tl.int64) * word_stride + (i // 32).to(tl.int64) * num_keys + key
        if SOME:
            chosen = chosen != ((tl.load(word, mask=key <= end, other=0) & bit) != 0)
        tl.atomic_xor(word, bit, mask=chosen, sem="relaxed")
