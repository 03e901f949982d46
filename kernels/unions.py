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
    counts: Tensor  # [B, N] int32


def unions(words: Tensor, tile: int, capacity: int, pad: int = 128) -> Unions:
    """List the keys of each tile of queries.

    Args:
        words: [B, ⌈T/32⌉, S] int32 (`kernels.words`).
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
            words, found, members, counts, keys, capacity, lists, TILE=tile, PAD=pad, BLOCK=BLOCK, num_warps=8
        )
    return Unions(found, members, counts)


@triton.jit
def _list(
    words, found, members, counts, num_keys, capacity, lists, TILE: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0)
    batch, tile = program // lists, program % lists
    per_word: tl.constexpr = 32 // TILE
    row = (batch * (lists // per_word) + tile // per_word).to(tl.int64)
    of_tile = tl.full((), (1 << TILE) - 1, tl.int64).to(tl.int32) << (tile % per_word * TILE)
    out = program.to(tl.int64) * capacity
    count = 0
    for first in range(0, num_keys, BLOCK):
        key = first + tl.arange(0, BLOCK)
        word = tl.load(words + row * num_keys + key, mask=key < num_keys, other=0) & of_tile
        present = (word != 0).to(tl.int32)
        place = count + tl.cumsum(present, 0) - 1
        tl.store(found + out + place, key, mask=word != 0)
        tl.store(members + out + place, word, mask=word != 0)
        count += tl.sum(present)
    tl.store(counts + program, count)
    place = count + tl.arange(0, PAD)
    end = (count + PAD - 1) // PAD * PAD
    tl.store(found + out + place, 0, mask=place < end)
    tl.store(members + out + place, 0, mask=place < end)
