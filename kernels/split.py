"""Attention of a few queries, as in decoding: each query's keys are split over many programs.

The selected keys of each query are listed, each program attends to a part of a list for the heads of one key/value
head, and the parts are then put together by their logarithmic sums. Shapes do not depend on the selection: a CUDA graph
can hold it.

- Floor: the selected keys and values are read once per query and key/value head, 4·d bytes each.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.support import INTERPRET, cdiv, next_power_of_2

BLOCK = 4096  # words of a program
PROGRAMS = 512  # enough to fill a GPU with some to spare


class Lists(NamedTuple):
    """The keys of each of R queries."""

    keys: Tensor  # [B, R, capacity] int32, ascending
    counts: Tensor  # [B, R] int32


def lists_of_few(words: Tensor, rows: int, capacity: int) -> Lists:
    """List the keys of the first `rows` queries of `words` [B, 1, S]; none has more than `capacity`."""
    batch, _, num_keys = words.shape
    blocks = cdiv(num_keys, BLOCK)
    partial = torch.empty(batch, rows, blocks, dtype=torch.int32, device=words.device)
    keys = torch.empty(batch, rows, capacity, dtype=torch.int32, device=words.device)
    counts = torch.empty(batch, rows, dtype=torch.int32, device=words.device)
    grid = (blocks, rows, batch)
    _count[grid](words, partial, words.stride(0), num_keys, BLOCK=BLOCK)
    _list[grid](
        words, partial, keys, counts, words.stride(0), num_keys, capacity,
        BLOCKS=next_power_of_2(blocks), BLOCK=BLOCK,
    )  # fmt: skip
    return Lists(keys, counts)


def attend_few(q: Tensor, k: Tensor, v: Tensor, words: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """`kernels.attend.attend` for up to `kernels.few.FEW` queries [B, R, H, d], with `words` [B, 1, S]."""
    batch, rows, heads, size = q.shape
    num_keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    padded = min(max(next_power_of_2(group), 16), 64)
    parts = cdiv(group, padded)
    lists = lists_of_few(words, rows, max(most, 1))
    block = 16 if INTERPRET else 64
    fair = most * batch * rows * kv_heads * parts // PROGRAMS
    step = min(max(next_power_of_2(max(fair, 1)), block), 1024)
    splits = cdiv(max(most, 1), step)
    sums = torch.empty(batch * rows, heads, splits, size, dtype=torch.float32, device=q.device)
    logs = torch.empty(batch * rows, heads, splits, dtype=torch.float32, device=q.device)
    out, lse = torch.empty_like(q), torch.empty(batch, rows, heads, dtype=torch.float32, device=q.device)
    _attend[(splits, kv_heads * parts, batch * rows)](
        q, k, v, *lists, sums, logs, math.log2(math.e) / math.sqrt(size), rows, num_keys, max(most, 1),
        HEADS=heads, KV_HEADS=kv_heads, D=size, PART=padded, PARTS=parts, STEP=step, BLOCK=block,
        ROUNDED=q.dtype != torch.float32, num_warps=4, num_stages=3,
    )  # fmt: skip
    _join[(batch * rows, heads)](
        sums, logs, out, lse, splits, HEADS=heads, D=size, SPLITS=next_power_of_2(splits), num_warps=4
    )
    return out, lse


@triton.jit
def _count(words, partial, stride, num_keys, BLOCK: tl.constexpr):
    key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words + tl.program_id(2).to(tl.int64) * stride + key, mask=key < num_keys, other=0)
    row = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial + row * tl.num_programs(0) + tl.program_id(0), tl.sum((word >> tl.program_id(1)) & 1))


@triton.jit
def _list(
    words, partial, keys, counts, stride, num_keys, capacity, BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    block = tl.arange(0, BLOCKS)
    count = tl.load(partial + row * tl.num_programs(0) + block, mask=block < tl.num_programs(0), other=0)
    before = tl.sum(tl.where(block < tl.program_id(0), count, 0))
    if tl.program_id(0) == 0:
        tl.store(counts + row, tl.minimum(tl.sum(count), capacity))
    if tl.sum(tl.where(block == tl.program_id(0), count, 0)) > 0:
        key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        word = tl.load(words + tl.program_id(2).to(tl.int64) * stride + key, mask=key < num_keys, other=0)
        mine = (word >> tl.program_id(1)) & 1
        place = before + tl.cumsum(mine, 0) - 1
        tl.store(keys + row.to(tl.int64) * capacity + place, key, mask=(mine != 0) & (place < capacity))


@triton.jit
def _attend(
    q, k, v, list_keys, counts, sums, logs, scale, rows, num_keys, capacity,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    STEP: tl.constexpr, BLOCK: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """The output over STEP keys of a query's list, normalised, and its logarithmic sum in base 2."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    split, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    kv_head, part = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    in_group = part * PART + tl.arange(0, PART)
    real = in_group < GROUP
    head_row = row * HEADS + kv_head * GROUP + in_group
    channel = tl.arange(0, D)
    queries = tl.load(q + head_row[:, None] * D + channel, mask=real[:, None], other=0.0)
    kv = (row // rows * num_keys * KV_HEADS + kv_head) * D
    end = tl.minimum(tl.load(counts + row), split * STEP + STEP)
    highest = tl.full((PART,), -1e30, tl.float32)
    total = tl.zeros((PART,), tl.float32)
    acc = tl.zeros((PART, D), tl.float32)
    for i in range(split * STEP, end, BLOCK):
        place = i + tl.arange(0, BLOCK)
        inside = place < end
        key = tl.load(list_keys + row * capacity + place, mask=inside, other=0).to(tl.int64)
        at = kv + key[:, None] * (KV_HEADS * D) + channel
        keys = tl.load(k + at, mask=inside[:, None], other=0.0)
        logits = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        logits = tl.where(inside[None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        p = tl.exp2(logits - higher[:, None])
        shrink = tl.exp2(highest - higher)
        highest = higher
        total = total * shrink + tl.sum(p, 1)
        values = tl.load(v + at, mask=inside[:, None], other=0.0)
        acc = tl.dot(p.to(values.dtype) if ROUNDED else p, values, acc * shrink[:, None], input_precision="ieee")
    empty = total == 0
    splits = tl.num_programs(0)
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    tl.store(sums + (head_row * splits + split)[:, None] * D + channel, acc, mask=real[:, None])
    tl.store(logs + head_row * splits + split, tl.where(empty, float("-inf"), highest + tl.log2(total)), mask=real)


@triton.jit
def _join(sums, logs, out, lse, splits, HEADS: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr):
    head_row = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    split, channel = tl.arange(0, SPLITS), tl.arange(0, D)
    log = tl.load(logs + head_row * splits + split, mask=split < splits, other=float("-inf"))
    highest = tl.maximum(tl.max(log), -1e30)
    weight = tl.exp2(log - highest)
    total = tl.sum(weight)
    place = (head_row * splits + split)[:, None] * D + channel
    parts = tl.load(sums + place, mask=(split < splits)[:, None], other=0.0)
    # a part without keys weighs nothing, whatever stands in it
    result = tl.sum(parts * weight[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out + head_row * D + channel, result)
    nothing = total == 0
    log_sum = (highest + tl.log2(tl.where(nothing, 1.0, total))) * 0.6931471805599453
    tl.store(lse + head_row, tl.where(nothing, float("-inf"), log_sum))
