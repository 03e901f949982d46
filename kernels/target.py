"""The attention's mean over heads for the keys on lists: what the indexer is to predict.

A program takes a tile of 32 queries and walks through the union of their selections, a block of keys at a time: it
makes the block's attention anew, head after head, from the saved logarithms of the softmax's sums. No [H, T, S] tensor
exists, and of the mean only that of some queries at a time (`queries_of_targets`). On sm_90 `kernels.target_tiles` does
this.

Floor: 2·d operations and one exponential per head, query and key of the union, half of the attention itself.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import hopper, target_tiles
from kernels.support import INTERPRET, cdiv, next_power_of_2, tuned
from kernels.unions import Unions, queries_at_once
from kernels.words import WORD, unpack

BYTES = 2**30  # of targets that exist at one time
RUNS = 2  # programs for the list of one tile: side by side they read its queries, 8 KiB a head, from the L2 cache


def target_definition(q: Tensor, k: Tensor, lse: Tensor, words: Tensor) -> Tensor:
    """The attention's mean over heads, [B, T, S] in fp32 or better, 0 where nothing is selected."""
    precise = torch.promote_types(q.dtype, torch.float32)
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    logits = torch.einsum("bthd,bshd->bhts", q.to(precise), keys.to(precise)) / math.sqrt(q.shape[3])
    logits = logits - lse.transpose(1, 2)[..., None]
    return logits.masked_fill(~unpack(words, q.shape[1])[:, None], -math.inf).exp().mean(1)


def unit_of(q: Tensor) -> float:
    """What 1 stands for in `targets`: where tensors have 16 bits they are fp16 and count in 2⁻¹⁴, so that they keep 11
    bits of what is above 4e-9."""
    return 1.0 if q.dtype == torch.float32 else 2.0**-14


def queries_of_targets(q: Tensor, num_keys: int) -> int:
    """Of how many queries of each row targets exist at one time."""
    size = 4 if q.dtype == torch.float32 else 2
    return queries_at_once(q.shape[0], num_keys, BYTES // size)


def base_two(lse: Tensor) -> Tensor:
    """Logarithms of sums as `targets` takes them: to base 2, +∞ for a query that selects nothing."""
    return (lse * math.log2(math.e)).masked_fill(lse == -math.inf, math.inf).contiguous()


def targets(q: Tensor, k: Tensor, logs: Tensor, lists: Unions, first: int) -> Tensor:
    """Means over heads of softmax(q·k/√d), [B, N, capacity, 32], in multiples of `unit_of`.

    Args:
        q: [B, T, H, d].
        k: [B, S, K, d].
        logs: [B, T, H], logarithms of the softmax's sums (`base_two`).
        lists: of tiles of 32 queries, N of them from query `first` on. What stands where a query does not select a key
            and behind the end of a list is unspecified.
    """
    batch, length, heads, size = q.shape
    kv_heads, (_, tiles, capacity) = k.shape[2], lists.keys.shape
    kind = torch.float32 if q.dtype == torch.float32 else torch.float16
    out = torch.empty(batch, tiles, capacity, WORD, dtype=kind, device=q.device)
    group = heads // kv_heads
    part = min(next_power_of_2(group), 4)
    shape = {
        "HEADS": heads, "KV_HEADS": kv_heads, "D": size, "PART": part, "PARTS": cdiv(group, part),
        "WIDE": math.prod(k.shape[1:]) >= 2**31,
    }  # fmt: skip
    scale, unit = math.log2(math.e) / math.sqrt(size), 1 / (heads * unit_of(q))
    inputs = (q, k, logs, lists.keys, lists.counts, out, scale, unit, first, length, k.shape[1], capacity)
    if not out.numel():
        return out
    if hopper.takes(q, k):
        runs = target_tiles.RUNS
        works = tiles * batch * runs
        target_tiles.mean_tiles[hopper.grid(works, q)](*inputs, tiles, works, **shape, RUNS=runs, **target_tiles.LAUNCH)
        return out
    meta = {"BLOCK": 64 if tuned(q) else 32, "num_warps": 8, "num_stages": 3 if tuned(q) else 2}
    if INTERPRET:
        meta["BLOCK"] = 16
    mean[(RUNS, tiles, batch)](*inputs, **shape, **meta)
    return out


@triton.jit
def run_of(counts, own, capacity, BLOCK: tl.constexpr):
    """Which part of a list is a program's: where it begins, and where it ends."""
    count = tl.minimum(tl.load(counts + own), capacity)
    length = tl.cdiv(tl.cdiv(count, BLOCK), tl.num_programs(0)) * BLOCK
    first = tl.program_id(0) * length
    return first, tl.minimum(first + length, count)


@triton.jit
def mean(
    q, k, logs, list_keys, counts, out, scale, unit, first, length, num_keys, capacity,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS // KV_HEADS
    tile, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    own = batch * tl.num_programs(1) + tile
    channel = tl.arange(0, D)
    # one head's queries after the other's, so that sums over heads are within a thread
    column = tl.arange(0, PART * 32)
    query = first + tile * 32 + column % 32
    begin, end = run_of(counts, own, capacity, BLOCK)
    for i in range(begin, end, BLOCK):
        entry = own * capacity + i + tl.arange(0, BLOCK)
        key = tl.load(list_keys + entry)  # lists are padded
        key = batch * num_keys + key.to(tl.int64)
        found = tl.zeros((BLOCK, 32), tl.float32)
        for step in range(KV_HEADS * PARTS):
            kv_head, in_group = step // PARTS, step % PARTS * PART + column // 32
            inside = (query < length) & (in_group < GROUP)
            head_row = (batch * length + query) * HEADS + kv_head * GROUP + in_group
            queries = tl.load(q + head_row[:, None] * D + channel, mask=inside[:, None], other=0.0)
            log = tl.load(logs + head_row, mask=inside, other=float("inf"))
            keys = tl.load(k + (key * KV_HEADS + kv_head)[:, None] * D + channel)
            p = tl.exp2(tl.dot(keys, tl.trans(queries), input_precision="ieee") * scale - log[None, :])
            found += tl.sum(tl.reshape(p, (BLOCK, PART, 32)), 1)
        tl.store(out + entry[:, None] * 32 + tl.arange(0, 32)[None, :], (found * unit).to(out.dtype.element_ty))
