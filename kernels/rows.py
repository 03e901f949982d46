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
from kernels.kth import CHUNKS, alive, kth
from kernels.scan import ENTROPY, REACHED, VARIANCE
from kernels.scores import unordered
from kernels.support import INTERPRET, cdiv, next_power_of_2, tuned

ROOM = 2**14  # scores of a query that a program holds
PAIRS = 2**27  # of queries and keys whose scores exist at one time


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
        if alive(i, start, last, CHUNK):
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
