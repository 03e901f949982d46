"""Windows: queries that share the selection of the first of them, their leader, and see all that came since.

With an empty selection and the document as the window, that is also how every visible key is selected.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rule import Asked
from kernels.support import INTERPRET, cdiv, runs_triton
from kernels.words import WORD, pack, unpack

BLOCK = 16 if INTERPRET else 1024  # keys of a program
QUERIES = 16 if INTERPRET else 4096  # of a step


def firsts_of(starts: Tensor, positions: Tensor, share: int) -> Tensor:
    """The first of each query's window, as a place among the keys: windows of `share` queries at `positions` [B, T] are
    aligned to `starts` [B, T], their documents' first keys."""
    return positions - (positions - starts) % share


class Windows(NamedTuple):
    """The windows of T queries."""

    firsts: Tensor  # [B, T], as of `firsts_of`
    number: Tensor  # [B, T] which of the leaders is each query's; negative: one that came before these queries
    leaders: Tensor  # [B, R] the place of each leader among the queries; 0 where there are fewer than R
    asked: Asked  # [B, R] of the leaders; nothing where there are fewer

    @classmethod
    def of(cls, asked: Asked, share: int, most: int) -> "Windows":
        """Windows of `share` queries, of which no row has more than `most`; each query is the last key that it sees."""
        if not runs_triton(asked.lasts):
            return cls.definition(asked, share, most)
        batch, length = asked.lasts.shape
        rows = [x if x.stride(1) == 1 else x.contiguous() for x in asked]
        firsts, number = torch.empty(2, batch, length, dtype=torch.int32, device=asked.lasts.device)
        of_leaders = torch.empty(4, batch, most, dtype=torch.int32, device=firsts.device)
        leaders = torch.empty(batch, most, dtype=torch.long, device=firsts.device)
        _lead[(batch,)](
            *rows, firsts, number, leaders, *of_leaders, *(x.stride(0) for x in rows), share, length, most,
            BLOCK=QUERIES, num_warps=8,
        )  # fmt: skip
        return cls(firsts, number, leaders, Asked(*of_leaders))

    @classmethod
    def definition(cls, asked: Asked, share: int, most: int) -> "Windows":
        """What `of` computes."""
        starts, lasts = asked.starts, asked.lasts
        firsts = firsts_of(starts, lasts, share)
        number = (firsts == lasts).cumsum(1) - 1
        places = torch.arange(lasts.shape[1], device=lasts.device).expand_as(lasts)
        leaders = places.new_zeros(len(lasts), most + 1)
        leaders = leaders.scatter_(1, torch.where(firsts == lasts, number, most), places)[:, :most]
        real = torch.arange(most, device=lasts.device) <= number[:, -1:]
        led = (x.int() for x in asked.at(leaders))
        nothing = (0, -1, 0, 0)
        found = Asked(*(torch.where(real, x, other) for x, other in zip(led, nothing, strict=True)))
        return cls(firsts.int(), number.int(), leaders, found)

    def of_queries(self, of_leaders: Tensor, lasts: Tensor) -> Tensor:
        """What leaders have [B, R], for each of the queries at `lasts` [B, T]: 0 for one that does not lead."""
        return torch.where(self.firsts == lasts, of_leaders.gather(1, self.number.clamp_min(0).long()), 0)


def visible(starts: Tensor, positions: Tensor, num_keys: int) -> Tensor:
    """Words of all keys from each query's document's start [B, T] to its own place, `positions` [T]."""
    nothing = torch.empty(starts.shape[0], 0, num_keys, dtype=torch.int32, device=starts.device)
    words: Tensor = spread(nothing, None, torch.full_like(starts, -1), starts, positions.expand_as(starts))[0]
    return words


@torch.library.custom_op("gsa::spread", mutates_args=())
def spread(
    words: Tensor, carried: Tensor | None, number: Tensor, firsts: Tensor, lasts: Tensor
) -> tuple[Tensor, Tensor]:
    """Words [B, ⌈T/32⌉, S] of queries that select what their leader does, and `firsts` to `lasts`.

    Args:
        words: [B, N, S] int32, of the leaders.
        carried: [B, S'] bool, S' ≤ S, the selection of a leader that came before the queries; `None`: nothing.
        number: [B, T] whose selection a query takes, below 32·N; negative: `carried`.
        firsts: [B, T].
        lasts: [B, T], before which all lies that is selected.

    Returns:
        The words, and the selection [B, S] bool of the last query's leader.
    """
    if not runs_triton(words):
        return spread_definition(words, carried, number, firsts, lasts)
    batch, length = number.shape
    num_keys = words.shape[2]
    out = torch.empty(batch, cdiv(length, WORD), num_keys, dtype=torch.int32, device=words.device)
    led = torch.empty(batch, num_keys, dtype=torch.bool, device=words.device)
    if out.numel():
        held = torch.empty(batch, 0, dtype=torch.bool, device=words.device) if carried is None else carried.contiguous()
        _spread[(out.shape[1], cdiv(num_keys, BLOCK), batch)](
            words.contiguous(), held.view(torch.uint8), number.int().contiguous(), firsts.int().contiguous(),
            lasts.int().contiguous(), out, led.view(torch.uint8), words.shape[1], held.shape[1], length, num_keys,
            BLOCK=BLOCK,
        )  # fmt: skip
    return out, led


@spread.register_fake
def _(words: Tensor, carried: Tensor | None, number: Tensor, firsts: Tensor, lasts: Tensor) -> tuple[Tensor, Tensor]:
    batch, num_keys = number.shape[0], words.shape[2]
    return (
        words.new_empty(batch, (number.shape[1] + WORD - 1) // WORD, num_keys),
        words.new_empty(batch, num_keys, dtype=torch.bool),
    )


def spread_definition(
    words: Tensor, carried: Tensor | None, number: Tensor, firsts: Tensor, lasts: Tensor
) -> tuple[Tensor, Tensor]:
    """What `spread` computes, as booleans."""
    key = torch.arange(words.shape[2], device=words.device)
    selected = torch.zeros(len(words), 1 + words.shape[1] * WORD, len(key), dtype=torch.bool, device=words.device)
    selected[:, 1:] = unpack(words, words.shape[1] * WORD)
    if carried is not None:
        selected[:, 0, : carried.shape[1]] = carried
    led = selected.gather(1, (number.long().clamp_min(-1) + 1)[..., None].expand(-1, -1, len(key)))
    return pack(led | ((key >= firsts[..., None]) & (key <= lasts[..., None]))), led[:, -1].clone()


@triton.jit
def _lead(
    starts, lasts, nominal, wanted, firsts, number, leaders, led_starts, led_lasts, led_nominal, led_wanted,
    start_stride, last_stride, nominal_stride, wanted_stride, share, length, most, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program lists the leaders of a row."""
    batch = tl.program_id(0).to(tl.int64)
    count = 0
    for first in range(0, length, BLOCK):
        i = first + tl.arange(0, BLOCK)
        real = i < length
        start = tl.load(starts + batch * start_stride + i, mask=real, other=0).to(tl.int32)
        last = tl.load(lasts + batch * last_stride + i, mask=real, other=0).to(tl.int32)
        into = (last - start) % share
        into = tl.where(into < 0, into + share, into)  # padding before the first document
        leads = real & (into == 0)
        place = count + tl.cumsum(leads.to(tl.int32), 0) - 1
        tl.store(firsts + batch * length + i, last - into, mask=real)
        tl.store(number + batch * length + i, place, mask=real)
        listed = leads & (place < most)
        target = batch * most + place
        tl.store(leaders + target, i.to(tl.int64), mask=listed)
        tl.store(led_starts + target, start, mask=listed)
        tl.store(led_lasts + target, last, mask=listed)
        of_query = tl.load(nominal + batch * nominal_stride + i, mask=listed, other=0)
        tl.store(led_nominal + target, of_query.to(tl.int32), mask=listed)
        of_query = tl.load(wanted + batch * wanted_stride + i, mask=listed, other=0)
        tl.store(led_wanted + target, of_query.to(tl.int32), mask=listed)
        count += tl.sum(leads.to(tl.int32))
    zero = tl.zeros((BLOCK,), tl.int32)
    for first in range(count, most, BLOCK):
        place = first + tl.arange(0, BLOCK)
        target, rest = batch * most + place, place < most
        tl.store(leaders + target, zero.to(tl.int64), mask=rest)
        tl.store(led_starts + target, zero, mask=rest)
        tl.store(led_lasts + target, zero - 1, mask=rest)
        tl.store(led_nominal + target, zero, mask=rest)
        tl.store(led_wanted + target, zero, mask=rest)


@triton.jit
def _selected(words, carried, number, batch, key, num_words, num_held, num_keys):
    """For each key whether the leader of that number selects it, as 0 or 1."""
    leader = tl.maximum(number, 0)
    word = tl.load(
        words + (batch * num_words + leader // 32) * num_keys + key, mask=(key < num_keys) & (number >= 0), other=0
    )
    before = tl.load(carried + batch * num_held + key, mask=(key < num_held) & (number < 0), other=0)
    return ((word >> (leader % 32)) & 1) | before.to(tl.int32)


@triton.jit
def _spread(
    words, carried, number, firsts, lasts, out, led, num_words, num_held, length, num_keys, BLOCK: tl.constexpr
):  # fmt: skip
    tile, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    key = start + tl.arange(0, BLOCK)
    inside = key < num_keys
    count = tl.minimum(32, length - tile * 32)
    query = tl.arange(0, 32)
    real = query < count
    at = batch * length + tile * 32 + query
    leaders = tl.load(number + at, mask=real, other=-2147483648)
    leader = tl.max(leaders)
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
            word = -_selected(words, carried, leader, batch, key, num_words, num_held, num_keys) & everyone
        else:
            for j in range(count):
                mine = tl.load(number + batch * length + tile * 32 + j)
                word = word | (_selected(words, carried, mine, batch, key, num_words, num_held, num_keys) << j)
        if start + BLOCK > first:
            for j in range(count):
                one = batch * length + tile * 32 + j
                window = (key >= tl.load(firsts + one)) & (key <= tl.load(lasts + one))
                word = word | (window.to(tl.int32) << j)
    tl.store(out + (batch * tl.num_programs(0) + tile) * num_keys + key, word, mask=inside)
    if tile == tl.num_programs(0) - 1:
        mine = tl.load(number + batch * length + length - 1)
        chosen = _selected(words, carried, mine, batch, key, num_words, num_held, num_keys)
        tl.store(led + batch * num_keys + key, chosen.to(tl.int8), mask=inside)
