"""The keys that a tile of neighbouring queries attends to, as a list: what attention over a selection walks through.

A tile of B queries reads the union of its selections once, and each key comes with a word that says which of the
queries want it. The union is u(B)·k keys long, u(B) from 1 (all agree) to B (none do).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.words import WORD

BLOCK = 1024  # words read at once


class Unions(NamedTuple):
    """N lists, one for each tile of `tile` queries."""

    keys: Tensor  # [B, N, capacity] int32, ascending; unspecified beyond the count
    words: Tensor  # [B, N, capacity] int32, the word of each key
    counts: Tensor  # [B, N] int32; a list that is longer than the capacity is cut


def unions(words: Tensor, ends: Tensor, tile: int, capacity: int, pad: int = 128) -> Unions:
    """List the keys of each tile of queries.

    Args:
        words: [B, ⌈T/32⌉, S] int32 (`kernels.words`).
        ends: [B, ⌈T/32⌉] int32: no query of a word selects this key or a later one.
        tile: queries per list, a power of two up to 32.
        capacity: room for the keys of one list: S, or any other bound on their number.
        pad: lists are followed by as many entries of key 0 and word 0 as make their length a multiple of this.
    """
    batch, rows, keys = words.shape
    lists = rows * (WORD // tile)
    capacity = -(-capacity // pad) * pad
    found = torch.empty(batch, lists, capacity, dtype=torch.int32, device=words.device)
    members = torch.empty_like(found)
    counts = torch.empty(batch, lists, dtype=torch.int32, device=words.device)
    if counts.numel():
        _list[(batch * lists,)](
            words, ends, found, members, counts, words.stride(0), keys, capacity, lists,
            TILE=tile, PAD=pad, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return Unions(found, members, counts)


def causal_ends(words: Tensor, num_queries: int, first: int) -> Tensor:
    """`ends` of words from query `first` on, where the queries are the last `num_queries` keys and none looks ahead."""
    batch, rows, num_keys = words.shape
    rows_end = torch.arange(1, rows + 1, dtype=torch.int32, device=words.device) * WORD
    return (rows_end + num_keys - num_queries + first).expand(batch, rows).contiguous()


@triton.jit
def _list(
    words, ends, found, members, counts, stride, num_keys, capacity, lists,
    TILE: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    batch, tile = program // lists, program % lists
    per_word: tl.constexpr = 32 // TILE
    row = batch.to(tl.int64) * stride + (tile // per_word).to(tl.int64) * num_keys
    of_tile = tl.full((), (1 << TILE) - 1, tl.int64).to(tl.int32) << (tile % per_word * TILE)
    out = program.to(tl.int64) * capacity
    count = 0
    end_key = tl.minimum(tl.load(ends + batch * (lists // per_word) + tile // per_word), num_keys)
    for first in range(0, end_key, BLOCK):
        key = first + tl.arange(0, BLOCK)
        word = tl.load(words + row + key, mask=key < end_key, other=0) & of_tile
        present = (word != 0).to(tl.int32)
        place = count + tl.cumsum(present, 0) - 1
        tl.store(found + out + place, key, mask=(word != 0) & (place < capacity))
        tl.store(members + out + place, word, mask=(word != 0) & (place < capacity))
        count += tl.sum(present)
    tl.store(counts + program, count)
    place = count + tl.arange(0, PAD)
    end = (count + PAD - 1) // PAD * PAD
    tl.store(found + out + place, 0, mask=place < tl.minimum(end, capacity))
    tl.store(members + out + place, 0, mask=place < tl.minimum(end, capacity))
