"""The keys that a tile of neighbouring queries attends to, as a list: what attention over a selection walks through.

A tile of B queries reads the union of its selections once, and each key comes with a word that says which of the
queries want it. The union is u(B)·k keys long, u(B) from 1 (all agree) to B (none do).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.words import WORD

BLOCK = 1024  # words read at once
# At most so many queries, of so many queries and keys, have lists at one time: with tiles of 32 queries and 8 heads, or
# of 16 and 4, programs of an H100's 132 multiprocessors take 32 tiles each. With 16,384 queries some take one more.
QUERIES = 132 * 128
PAIRS = QUERIES * 2**17


def queries_at_once(batch: int, num_keys: int, pairs: int = PAIRS) -> int:
    """How many queries of each row are handled at once, a multiple of 64: few bound memory, many take few launches."""
    return min(max(pairs // max(batch * num_keys, 1), 64), QUERIES) // 64 * 64


class Unions(NamedTuple):
    """N lists, one for each tile of `tile` queries."""

    keys: Tensor  # [B, N, capacity] int32, ascending; unspecified beyond the count
    words: Tensor  # [B, N, capacity] int32, the word of each key
    counts: Tensor  # [B, N] int32; a list that is longer than the capacity is cut


def unions(words: Tensor, ends: Tensor | int, tile: int, capacity: int, pad: int = 128) -> Unions:
    """List the keys of each tile of queries.

    Args:
        words: [B, ⌈T/32⌉, S] int32 (`kernels.words`).
        ends: [B, ⌈T/32⌉] int32: no query of a word selects this key or a later one. Or the first word's, where each
            later one's is 32 more.
        tile: queries per list, a power of two up to 32.
        capacity: room for the keys of one list: S, or any other bound on their number.
        pad: lists are followed by as many entries of key 0 and word 0 as make their length a multiple of this.
    """
    if tile == WORD:
        return _list_of(None, words, ends, 1, WORD, capacity, pad)
    whole = _list_of(None, words, ends, 1, WORD, min(capacity * (WORD // tile), words.shape[2]), pad)
    return _list_of(whole.keys, whole.words, whole.counts, WORD // tile, tile, min(capacity, words.shape[2]), pad)


def _list_of(
    keys: Tensor | None, words: Tensor, ends: Tensor | int, parts: int, tile: int, capacity: int, pad: int
) -> Unions:
    """Lists of each `tile` bits of rows [B, N, S] of words, up to `ends` [B, N], which belong to `keys`.

    `keys` [B, N, S], or `None` where key s is at place s.
    """
    batch, rows, length = words.shape
    capacity = -(-capacity // pad) * pad
    found = torch.empty(batch, rows * parts, capacity, dtype=torch.int32, device=words.device)
    members = torch.empty_like(found)
    counts = torch.empty(batch, rows * parts, dtype=torch.int32, device=words.device)
    if counts.numel():
        even = isinstance(ends, int)
        _list[(batch * rows * parts,)](
            words if keys is None else keys, words, words if even else ends, found, members, counts, words.stride(0),
            length, capacity, rows * parts, ends if even else 0, EVEN=even, LISTED=keys is not None, PARTS=parts,
            TILE=tile, PAD=pad, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return Unions(found, members, counts)


def causal_unions(words: Tensor, num_queries: int, tile: int, most: int, step: int) -> Iterator[tuple[int, Unions]]:
    """The lists of `step` queries at a time, each with the first of them.

    Args:
        words: [B, ⌈T/32⌉, S]: the queries are the last of the keys, and none looks ahead.
        num_queries: T.
        tile: as of `unions`.
        most: a bound on the keys that one query selects.
        step: a multiple of 32.
    """
    num_keys = words.shape[2]
    for first in range(0, num_queries, step):
        part = words[:, first // WORD : (first + step) // WORD]
        end = num_keys - num_queries + first + WORD
        yield first, unions(part, end, tile, min(most * tile, num_keys))


@triton.jit
def _list(
    keys, words, ends, found, members, counts, stride, length, capacity, lists, first_end,
    EVEN: tl.constexpr, LISTED: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    batch, tile = program // lists, program % lists
    row = batch.to(tl.int64) * stride + (tile // PARTS).to(tl.int64) * length
    of_tile = tl.full((), (1 << TILE) - 1, tl.int64).to(tl.int32) << (tile % PARTS * TILE)
    out = program.to(tl.int64) * capacity
    count = 0
    if EVEN:
        stop = first_end + tile // PARTS * 32
    else:
        stop = tl.load(ends + batch * (lists // PARTS) + tile // PARTS)
    end = tl.minimum(stop, length)
    place = tl.arange(0, BLOCK)
    coming = tl.load(words + row + place, mask=place < end, other=0)
    for first in range(0, end, BLOCK):
        word = coming & of_tile
        place = first + tl.arange(0, BLOCK)
        coming = tl.load(words + row + BLOCK + place, mask=BLOCK + place < end, other=0)  # while this block is listed
        here = word != 0
        key = place
        if LISTED:
            key = tl.load(keys + row + place, mask=here, other=0)
        target = count + tl.cumsum(here.to(tl.int32), 0) - 1
        tl.store(found + out + target, key, mask=here & (target < capacity))
        tl.store(members + out + target, word, mask=here & (target < capacity))
        count += tl.sum(here.to(tl.int32))
    if LISTED:
        tl.store(counts + program, tl.where(stop > length, capacity + 1, count))  # what comes from a cut list is cut
    else:
        tl.store(counts + program, count)
    place = count + tl.arange(0, PAD)
    end = (count + PAD - 1) // PAD * PAD
    tl.store(found + out + place, 0, mask=place < tl.minimum(end, capacity))
    tl.store(members + out + place, 0, mask=place < tl.minimum(end, capacity))
