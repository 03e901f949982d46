"""Windows: queries that share the selection of the first of them, and see all that came since.

With an empty selection and the document as the window, that is also how every visible key is selected.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.support import INTERPRET, cdiv, runs_triton
from kernels.words import WORD, pack, unpack

BLOCK = 16 if INTERPRET else 1024  # keys of a program


class Windows(NamedTuple):
    """The windows of T queries, aligned to their documents' starts."""

    firsts: Tensor  # [B, T] the first query of each query's window, as a place among the keys
    positions: Tensor  # [B, T] the queries' own places

    @classmethod
    def of(cls, starts: Tensor, positions: Tensor, share: int) -> "Windows":
        """Windows of `share` queries at `positions` [B, T]; `starts` [B, T] are their documents' first keys."""
        return cls(positions - (positions - starts) % share, positions)

    def share(self, words: Tensor, number: Tensor, leader: Tensor | None) -> tuple[Tensor, Tensor]:
        """Give every query its window's selection.

        Args:
            words: [B, N, S], in which query `number` [B, T] is the first of each query's window; a negative number
                says that it came before these queries.
            number: see there.
            leader: [B, S'] bool, the selection of that earlier query, if there is one.

        Returns:
            Words [B, ⌈T/32⌉, S] and the selection [B, S] bool of the last query's leader.
        """
        carried = words.new_zeros(words.shape[0], 1, words.shape[2])  # query 0 of a word of its own
        if leader is not None:
            carried[:, 0, : leader.shape[1]] = leader
        words = torch.cat((carried, words), 1)
        number = torch.where(number < 0, 0, number + WORD)
        last = number[:, -1]
        word = words.gather(1, (last // WORD)[:, None, None].expand(-1, 1, words.shape[2]))[:, 0]
        return spread(words, number, self.firsts, self.positions), ((word >> (last % WORD)[:, None].int()) & 1).bool()


def visible(starts: Tensor, positions: Tensor, num_keys: int) -> Tensor:
    """Words of all keys from each query's document's start [B, T] to its own place, `positions` [T]."""
    nothing = torch.zeros(starts.shape[0], 1, num_keys, dtype=torch.int32, device=starts.device)
    words: Tensor = spread(nothing, torch.zeros_like(starts), starts, positions.expand_as(starts))
    return words


@torch.library.custom_op("gsa::spread", mutates_args=())
def spread(words: Tensor, number: Tensor, firsts: Tensor, lasts: Tensor) -> Tensor:
    """Words [B, ⌈T/32⌉, S] of queries that select what query `number` of `words` does, and `firsts` to `lasts`.

    Args:
        words: [B, N, S] int32.
        number: [B, T], below 32·N.
        firsts: [B, T].
        lasts: [B, T].
    """
    if not runs_triton(words):
        return spread_definition(words, number, firsts, lasts)
    batch, length = number.shape
    num_keys = words.shape[2]
    out = torch.empty(batch, cdiv(length, WORD), num_keys, dtype=torch.int32, device=words.device)
    if out.numel():
        _spread[(out.shape[1], cdiv(num_keys, BLOCK), batch)](
            words.contiguous(), number.int().contiguous(), firsts.int().contiguous(), lasts.int().contiguous(), out,
            words.shape[1], length, num_keys, BLOCK=BLOCK,
        )  # fmt: skip
    return out


@spread.register_fake
def _(words: Tensor, number: Tensor, firsts: Tensor, lasts: Tensor) -> Tensor:
    return words.new_empty(number.shape[0], (number.shape[1] + WORD - 1) // WORD, words.shape[2])


def spread_definition(words: Tensor, number: Tensor, firsts: Tensor, lasts: Tensor) -> Tensor:
    """What `spread` computes, as booleans."""
    key = torch.arange(words.shape[2], device=words.device)
    led = unpack(words, words.shape[1] * WORD).gather(1, number[..., None].expand(-1, -1, words.shape[2]))
    return pack(led | ((key >= firsts[..., None]) & (key <= lasts[..., None])))


@triton.jit
def _spread(words, number, firsts, lasts, out, num_words, length, num_keys, BLOCK: tl.constexpr):
    tile, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    key = start + tl.arange(0, BLOCK)
    inside = key < num_keys
    count = tl.minimum(32, length - tile * 32)
    query = tl.arange(0, 32)
    real = query < count
    at = batch * length + tile * 32 + query
    leaders = tl.load(number + at, mask=real, other=0)
    leader = tl.max(tl.where(real, leaders, -1))
    alone = tl.min(tl.where(real, leaders, leader)) == leader
    first = tl.min(tl.load(firsts + at, mask=real, other=2147483647))
    last = tl.max(tl.load(lasts + at, mask=real, other=-1))
    everywhere = (start >= tl.max(tl.load(firsts + at, mask=real, other=-1))) & (
        start + BLOCK - 1 <= tl.min(tl.load(lasts + at, mask=real, other=2147483647))
    )
    everyone = tl.sum(tl.where(real, tl.full((32,), 1, tl.int32) << query, 0))
    word = tl.zeros((BLOCK,), tl.int32)
    if everywhere:
        word = tl.zeros((BLOCK,), tl.int32) + everyone
    elif start <= last:
        if alone:  # the usual case: windows are no smaller than words
            led = tl.load(words + (batch * num_words + leader // 32) * num_keys + key, mask=inside, other=0)
            word = -((led >> (leader % 32)) & 1) & everyone
        else:
            for j in range(count):
                mine = tl.load(number + batch * length + tile * 32 + j)
                led = tl.load(words + (batch * num_words + mine // 32) * num_keys + key, mask=inside, other=0)
                word = word | (((led >> (mine % 32)) & 1) << j)
        if start + BLOCK > first:
            for j in range(count):
                one = batch * length + tile * 32 + j
                window = (key >= tl.load(firsts + one)) & (key <= tl.load(lasts + one))
                word = word | (window.to(tl.int32) << j)
    tl.store(out + (batch * tl.num_programs(0) + tile) * num_keys + key, word, mask=inside)
