"""Selection in two levels: the best blocks of keys first, then the best keys of those blocks."""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.best import best
from kernels.few import FEW
from kernels.rule import Asked, Rule, Scores
from kernels.support import cdiv, runs_triton
from kernels.task import Candidates
from kernels.words import WORD, pack, unpack


def one_or_two_levels(
    scores: Scores, starts: Tensor, asked: Asked, reference: Tensor | None, rule: Rule, documents: int
) -> tuple[Tensor, Tensor]:
    """Words [B, ⌈R/32⌉, S] and statistic [B, R] of queries that each select for themselves; `documents` as of
    `kernels.select.select`."""
    num_keys = scores.k.shape[1]
    most = rule.most(num_keys)
    if not rule.two_levels(num_keys) or not asked.lasts.shape[1]:
        return best(scores, asked, reference, rule, most, None)
    few = asked.lasts.shape[1] <= FEW
    candidates = _of_few(scores, asked, rule) if few else _of_many(scores, starts, asked, rule, documents)
    return best(scores, asked, reference, rule, most, candidates)


def _of_many(scores: Scores, starts: Tensor, asked: Asked, rule: Rule, documents: int) -> Candidates:
    """The candidates of queries, by blocks that are pooled once for all of them."""
    pooled, of_key = pool(scores.k, starts, rule.block, documents)
    lasts = asked.lasts.clamp_min(0).long()
    own, first = of_key.gather(1, lasts), of_key.gather(1, torch.minimum(asked.starts.long(), lasts))
    chosen = _best_blocks(scores._replace(k=pooled.to(scores.k.dtype)), asked, first, own, rule)
    near, sinks = _always(asked, rule)

    def candidates(rows: slice) -> Tensor:
        words = chosen[:, rows.start // WORD : -(-rows.stop // WORD)]
        return _widen(words, of_key, near[:, rows], sinks[:, rows], asked.rows(rows))

    return candidates


def _of_few(scores: Scores, asked: Asked, rule: Rule) -> Candidates:
    """The same of a few queries, each of which pools its own document: no shape depends on where documents start."""
    batch, rows = asked.lasts.shape
    num_keys, size = scores.k.shape[1], rule.block
    count = -(-num_keys // size)
    place = torch.arange(count * size, device=scores.k.device)
    places = (asked.starts[..., None] + place).clamp_max(num_keys - 1)
    keys = scores.k[:, None].expand(-1, rows, -1, -1)
    keys = keys.gather(2, places[..., None].expand(-1, -1, -1, keys.shape[3])).unflatten(2, (count, size))
    pooled = keys.mean(3, dtype=torch.promote_types(keys.dtype, torch.float32)).to(keys.dtype)

    def alone(x: Tensor) -> Tensor:
        return x.reshape(batch * rows, 1, *x.shape[2:])

    weight = None if scores.weight is None else alone(scores.weight)
    own = alone((asked.lasts - asked.starts).clamp_min(0) // size)
    each = Asked(*(alone(x) for x in asked))
    of_blocks = Scores(alone(scores.q), pooled.flatten(0, 1), weight, scores.bias)
    chosen = _best_blocks(of_blocks, each, torch.zeros_like(own), own, rule)
    key = torch.arange(num_keys, device=scores.k.device)
    of_key = ((key - asked.starts[..., None]) // size).clamp(0, count - 1)
    mask = _with_always((chosen.view(batch, rows, count) & 1).bool().gather(2, of_key), *_always(asked, rule), asked)
    bits = torch.arange(rows, dtype=torch.int32, device=key.device)[:, None]
    words = (mask.int() << bits).sum(1, dtype=torch.int32, keepdim=True)
    return lambda _: words


def _best_blocks(scores: Scores, asked: Asked, first: Tensor, own: Tensor, rule: Rule) -> Tensor:
    """Words of the best of the blocks from `first` [B, R] to the one before a query's `own` [B, R]."""
    number = torch.minimum(rule.blocks(asked.nominal), own - first)
    coarse = Asked(first, torch.where(asked.available > 0, own - 1, -1), number, number)
    most = rule.blocks(rule.most(scores.k.shape[1] * rule.block))
    level = dataclasses.replace(rule, controller="given", k_min=0, k_max=most, local_window=0, sink_tokens=0)
    return best(scores, coarse, None, level, level.most(scores.k.shape[1]), None)[0]


def _always(asked: Asked, rule: Rule) -> tuple[Tensor, Tensor]:
    """From where and up to where keys are candidates whatever the scores say: a query's own block, the one before it,
    and those that must be chosen."""
    lasts = asked.lasts.clamp_min(0)
    near = lasts - (lasts - asked.starts) % rule.block - rule.block
    near = torch.maximum(asked.starts, torch.minimum(near, lasts - rule.local_window + 1))
    return near, torch.minimum(asked.starts + rule.sink_tokens, asked.lasts + 1)


def _with_always(mask: Tensor, near: Tensor, sinks: Tensor, asked: Asked) -> Tensor:
    """Candidates [B, R, S]: keys of chosen blocks, those that always are (`_always`), and none that is not seen."""
    key = torch.arange(mask.shape[2], device=mask.device)
    mask = mask | (key >= near[..., None]) | (key < sinks[..., None])
    return mask & (key >= asked.starts[..., None]) & (key <= asked.lasts[..., None])


def pool(keys: Tensor, starts: Tensor, size: int, documents: int = 0) -> tuple[Tensor, Tensor]:
    """Mean keys [B, N, d] of blocks that are counted from the start of each document, and each key's block [B, S].

    N is the number of blocks, for which the host waits for the GPU, or, where no row has more than so many documents, a
    bound on it. Means are in fp32 or better: sums of bf16 would depend on their order.
    """
    begins = (torch.arange(keys.shape[1], device=keys.device) - starts) % size == 0
    begins[:, :1] = True  # also where padding stands before the first document
    of_key = begins.cumsum(1) - 1
    count = 0
    if of_key.numel():
        count = keys.shape[1] // size + documents + 1 if documents else int(of_key.max()) + 1
    keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
    total = keys.new_zeros(keys.shape[0], count, keys.shape[2])
    total.scatter_add_(1, of_key[..., None].expand_as(keys), keys)
    members = keys.new_zeros(keys.shape[0], count).scatter_add_(1, of_key, torch.ones_like(keys[..., 0]))
    return total / members.clamp_min(1)[..., None], of_key


def _widen(words: Tensor, of_key: Tensor, near: Tensor, sinks: Tensor, asked: Asked) -> Tensor:
    """Words of candidates: keys of the chosen blocks, from `near` to the query itself, and before `sinks`."""
    batch, rows = asked.lasts.shape
    num_keys = of_key.shape[1]
    if not runs_triton(words):
        chosen = unpack(words, rows).gather(2, of_key[:, None].expand(-1, rows, -1))
        return pack(_with_always(chosen, near, sinks, asked))
    out = torch.empty(batch, words.shape[1], num_keys, dtype=torch.int32, device=words.device)
    block = 1024
    _widen_kernel[(words.shape[1], cdiv(num_keys, block), batch)](
        words, of_key.int(), near.int().contiguous(), sinks.int().contiguous(), asked.starts.int().contiguous(),
        asked.lasts.int().contiguous(), out, words.stride(0), rows, words.shape[2], num_keys, BLOCK=block,
    )  # fmt: skip
    return out


@triton.jit
def _widen_kernel(
    words, of_key, near, sinks, starts, lasts, out, word_stride, rows, num_blocks, num_keys, BLOCK: tl.constexpr
):
    tile, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    key = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = key < num_keys
    i = tile * 32 + tl.arange(0, 32)
    row = batch * rows + i
    end = tl.max(tl.load(lasts + row, mask=i < rows, other=-1))
    first = tl.min(tl.load(near + row, mask=i < rows, other=2147483647))
    sink = tl.max(tl.load(sinks + row, mask=i < rows, other=0))
    block = tl.load(of_key + batch * num_keys + key, mask=inside, other=0)
    word = tl.load(
        words + batch * word_stride + tile.to(tl.int64) * num_blocks + block, mask=inside & (key <= end), other=0
    )
    low = tl.program_id(1) * BLOCK
    if (low + BLOCK > first) | (low < sink):
        for j in range(tl.minimum(32, rows - tile * 32)):
            at = batch * rows + tile * 32 + j
            mine = (key >= tl.load(near + at)) | (key < tl.load(sinks + at))
            mine = mine & (key >= tl.load(starts + at)) & (key <= tl.load(lasts + at))
            word = word | (mine.to(tl.int32) << j)
    tl.store(out + (batch * tl.num_programs(0) + tile) * num_keys + key, word, mask=inside)
