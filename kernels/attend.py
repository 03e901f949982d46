"""Attention of grouped heads over a selection, forward and backward.

A program takes a tile of neighbouring queries and those of their heads that share one key/value head, 64 or 128 rows
together, and walks through the union of the tile's selections: keys that some query of the tile wants are read once,
and the word of each key masks the queries that do not.

- Floor: 4·d operations per head, query and key of the union; each tile reads 4·d bytes per key of its union and
  key/value head.
- Nothing of size [T, S] exists beyond the words; lists of unions exist for some queries at a time.
- Backward: gradients of queries are gathered in registers, those of keys and values by relaxed atomics
  (`kernels.gradient`).
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import hopper, hopper_backward
from kernels.few import FEW
from kernels.gradient import Gradient, add
from kernels.split import attend_few
from kernels.support import INTERPRET, cdiv, next_power_of_2, runs_triton, tuned
from kernels.unions import causal_unions, queries_at_once
from kernels.words import WORD, unpack

# Queries × heads of a program, the fastest measured on an H100. In the forward 64 rows read each key from the L2 cache
# more often than the 128 of `kernels.hopper` and compute less, as their unions are shorter.
FORWARD_ROWS, BACKWARD_ROWS = 64, 128
LOG2_E = math.log2(math.e)


class Tiles(NamedTuple):
    """How queries and heads are cut into programs."""

    queries: int  # of one tile, a power of two up to 32
    heads: int  # of one program, a power of two; those beyond the group are masked
    parts: int  # programs for the heads of one key/value head

    @classmethod
    def of(cls, group: int, rows: int) -> "Tiles":
        heads = min(next_power_of_2(group), rows)
        return cls(min(WORD, rows // heads), heads, -(-group // heads))

    @classmethod
    def of_forward(cls, group: int, roles: bool) -> "Tiles":
        """Those of the forward; `roles`: on a GPU for which there is `kernels.hopper`, which wants its tiles full."""
        full = cls.of(group, hopper.ROWS)
        return full if roles and full.rows == hopper.ROWS else cls.of(group, FORWARD_ROWS)

    @property
    def rows(self) -> int:
        return self.queries * self.heads


def attend_definition(q: Tensor, k: Tensor, v: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """What `attend` computes, in plain PyTorch and at least fp32."""
    precise = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[2]
    mask = unpack(words, q.shape[1])[:, None]  # [B, 1, T, S]
    keys = k.repeat_interleave(group, 2).transpose(1, 2).to(precise)
    values = v.repeat_interleave(group, 2).transpose(1, 2).to(precise)
    logits = q.transpose(1, 2).to(precise) @ keys.transpose(2, 3) / math.sqrt(q.shape[3])
    logits = logits.masked_fill(~mask, -math.inf)
    lse = logits.logsumexp(-1)
    attention = (logits - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    return (attention @ values).transpose(1, 2).to(q.dtype).contiguous(), lse.transpose(1, 2).contiguous()


def attend_backward_definition(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, words: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What `attend_backward` computes, in plain PyTorch and at least fp32."""
    precise = torch.promote_types(q.dtype, torch.float32)
    group, scale = q.shape[2] // k.shape[2], 1 / math.sqrt(q.shape[3])
    mask = unpack(words, q.shape[1])[:, None]
    queries, keys, values = (x.to(precise) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    logits = torch.einsum("bthd,bshd->bhts", queries, keys) * scale - lse.to(precise).transpose(1, 2)[..., None]
    p = logits.masked_fill(~mask, -math.inf).exp()
    upstream = grad.to(precise)
    inner = (upstream * out.to(precise)).sum(-1).transpose(1, 2)[..., None]
    ds = p * (torch.einsum("bthd,bshd->bhts", upstream, values) - inner) * scale
    dk = torch.einsum("bhts,bthd->bshd", ds, queries).unflatten(2, (-1, group)).sum(3)
    dv = torch.einsum("bhts,bthd->bshd", p, upstream).unflatten(2, (-1, group)).sum(3)
    dq = torch.einsum("bhts,bshd->bthd", ds, keys)
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()


@torch.library.custom_op("gsa::attend", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, words: Tensor, most: int, deterministic: bool = False
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over the keys selected for it.

    Args:
        q: [B, T, H, d].
        k: [B, S, K, d], K a divisor of H.
        v: [B, S, K, d].
        words: [B, ⌈T/32⌉, S] int32, the selection (`kernels.words`); the queries are the last T of the S keys, and none
            selects a key after itself.
        most: a bound on the number of keys that one query selects.
        deterministic: gradients equal from run to run, more slowly.

    Returns:
        The output [B, T, H, d] in the type of `q`, 0 for a query without keys, and the logarithm of the sum of
        exp(q·k/√d), [B, T, H] fp32, −inf for a query without keys.
    """
    if not runs_triton(q):
        return attend_definition(q, k, v, words)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    batch, length, heads, size = q.shape
    if 0 < length <= FEW and q.numel() and k.numel():
        return attend_few(q, k, v, words, min(most, k.shape[1]))
    out = torch.empty_like(q)
    lse = torch.empty(batch, length, heads, dtype=torch.float32, device=q.device)
    kv_heads = k.shape[2]
    tiles = Tiles.of_forward(heads // kv_heads, hopper.takes(q, k, v))
    roles = tiles.rows == hopper.ROWS
    shape = {
        "HEADS": heads, "KV_HEADS": kv_heads, "D": size, "TILE": tiles.queries, "PART": tiles.heads,
        "PARTS": tiles.parts, "WIDE": math.prod(k.shape[1:]) >= 2**31,
    }  # fmt: skip
    for first, lists in causal_unions(words, length, tiles.queries, most, queries_at_once(batch, k.shape[1])):
        scale, capacity = LOG2_E / math.sqrt(size), lists.keys.shape[2]
        inputs = (q, k, v, *lists, out, lse, scale, first, length, k.shape[1], capacity)
        grid = (lists.counts.shape[1], kv_heads * tiles.parts, batch)
        if roles:
            works = math.prod(grid)
            hopper.attend_tiles[hopper.grid(works, q)](
                *inputs, grid[0], works // grid[0], FAR=hopper.is_far(k), **shape, **hopper.LAUNCH
            )
        else:
            _forward[grid](*inputs, **shape, **_meta(q, tiles))
    return out, lse


@attend.register_fake
def _(q: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("gsa::attend_backward", mutates_args=())
def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Tensor,
    out: Tensor,
    lse: Tensor,
    most: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend`'s output with respect to q, k and v, in their types."""
    if not runs_triton(q):
        return attend_backward_definition(grad, q, k, v, words, out, lse)
    q, k, v, grad = q.contiguous(), k.contiguous(), v.contiguous(), grad.contiguous()
    batch, length, heads, size = q.shape
    kv_heads, tiles = k.shape[2], Tiles.of(heads // k.shape[2], BACKWARD_ROWS if tuned(q) else FORWARD_ROWS)
    roles = not deterministic and tiles.rows == hopper.ROWS and hopper.takes(q, k, v, grad)
    shape = {
        "HEADS": heads, "KV_HEADS": kv_heads, "D": size, "TILE": tiles.queries, "PART": tiles.heads,
        "PARTS": tiles.parts,
    }  # fmt: skip
    scale = 1 / math.sqrt(size)
    dq, delta = torch.empty_like(q), torch.empty(batch, length, heads, dtype=torch.float32, device=q.device)
    if delta.numel():
        _products[(cdiv(delta.numel(), 64),)](grad, out.contiguous(), delta, delta.numel(), D=size, ROWS=64)
    norms = [delta.new_zeros(())] * 3
    if deterministic and q.numel() and k.numel():
        norms = [x.float().norm(dim=-1).amax() for x in (grad, q, v)]
    dv = Gradient(v, norms[0], length * heads, deterministic)
    dk = Gradient(k, 2 * scale * norms[0] * norms[1] * norms[2], length * heads, deterministic)
    for first, lists in causal_unions(words, length, tiles.queries, most, queries_at_once(batch, k.shape[1])):
        grid = (lists.counts.shape[1], kv_heads * tiles.parts, batch)
        inputs = (q, k, v, *lists, grad, lse, delta, dq, dk.sum, dv.sum)
        sizes = (scale, first, length, k.shape[1], lists.keys.shape[2])
        if roles:
            works, wide = math.prod(grid), math.prod(k.shape[1:]) >= 2**31
            hopper_backward.gradient_tiles[hopper.grid(works, q)](
                *inputs, *sizes, grid[0], works // grid[0], WIDE=wide, FAR=hopper.is_far(k), **shape,
                **hopper_backward.LAUNCH,
            )  # fmt: skip
        else:
            meta = _meta(q, tiles, backward=True, fixed=deterministic)
            _backward[grid](*inputs, dk.unit, dv.unit, *sizes, **shape, FIXED=deterministic, **meta)
    return dq, dk.result(k.dtype), dv.result(v.dtype)


@attend_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, words, most, deterministic = inputs
    ctx.save_for_backward(q, k, v, words, *output)
    ctx.options = (most, deterministic)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad, _):
    return *attend_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


attend.register_autograd(_differentiate, setup_context=_save)


def _rounded(q: Tensor) -> bool:
    """Whether probabilities are rounded to the type of `q` before they multiply values, as tensor cores want it."""
    return q.dtype != torch.float32


def _meta(q: Tensor, tiles: Tiles, backward: bool = False, fixed: bool = False) -> dict[str, int | bool]:
    """How the kernels are launched; the fastest measured on an H100."""
    wide = tiles.rows >= 128
    meta = {"BLOCK": 64, "ROUNDED": _rounded(q), "num_warps": 8 if wide else 4, "num_stages": 3 if backward else 5}
    if INTERPRET:
        meta["BLOCK"] = 16
    elif not tuned(q):
        meta |= {"BLOCK": 32, "num_stages": 2, "num_warps": 8 if backward else 4}
    elif fixed:
        meta["BLOCK"] = 32  # int64 atomics take twice the registers
    return meta


@triton.jit
def _forward(
    q, k, v, list_keys, list_words, counts, out, lse, scale, first, length, num_keys, capacity,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, ROUNDED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS // KV_HEADS
    tile, batch = tl.program_id(0), tl.program_id(2)
    kv_head, part = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    row = tl.arange(0, TILE * PART)
    query, in_group = first + tile * TILE + row // PART, part * PART + row % PART
    real = (query < length) & (in_group < GROUP)
    head_row = (batch.to(tl.int64) * length + query) * HEADS + kv_head * GROUP + in_group
    bit = tl.full((TILE * PART,), 1, tl.int32) << (tile * TILE % 32 + row // PART)
    channel = tl.arange(0, D)
    queries = tl.load(q + head_row[:, None] * D + channel, mask=real[:, None], other=0.0)
    kv = (batch.to(tl.int64) * num_keys * KV_HEADS + kv_head) * D
    keys_at, values_at = k + kv, v + kv
    entries = (batch.to(tl.int64) * tl.num_programs(0) + tile) * capacity
    highest = tl.full((TILE * PART,), -1e30, tl.float32)  # of the logits before they are scaled
    total = tl.zeros((TILE * PART,), tl.float32)
    acc = tl.zeros((TILE * PART, D), tl.float32)
    for i in range(0, tl.load(counts + batch * tl.num_programs(0) + tile), BLOCK):
        entry = entries + i + tl.arange(0, BLOCK)
        key, word = tl.load(list_keys + entry), tl.load(list_words + entry)
        if WIDE:
            key = key.to(tl.int64)
        place = (key * (KV_HEADS * D))[:, None] + channel
        keys = tl.load(keys_at + place)
        logits = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        logits = tl.where((word[None, :] & bit[:, None]) != 0, logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        p = tl.exp2(logits * scale - (higher * scale)[:, None])
        shrink = tl.exp2((highest - higher) * scale)
        highest = higher
        total = total * shrink + tl.sum(p, 1)
        values = tl.load(values_at + place)
        acc = tl.dot(p.to(values.dtype) if ROUNDED else p, values, acc * shrink[:, None], input_precision="ieee")
    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    tl.store(out + head_row[:, None] * D + channel, acc, mask=real[:, None])
    log = tl.where(empty, float("-inf"), (highest * scale + tl.log2(total)) * 0.6931471805599453)
    tl.store(lse + head_row, log, mask=real)


@triton.jit
def _backward(
    q, k, v, list_keys, list_words, counts, grad, lse, delta, dq, dk, dv, dk_unit, dv_unit, scale, first, length,
    num_keys, capacity,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    TILE: tl.constexpr, FIXED: tl.constexpr, BLOCK: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile's queries, and what the tile adds to those of keys and values."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    tile, batch = tl.program_id(0), tl.program_id(2)
    kv_head, part = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    row = tl.arange(0, TILE * PART)
    query, in_group = first + tile * TILE + row // PART, part * PART + row % PART
    real = (query < length) & (in_group < GROUP)
    head_row = (batch.to(tl.int64) * length + query) * HEADS + kv_head * GROUP + in_group
    bit = tile * TILE % 32 + row // PART
    channel = tl.arange(0, D)
    queries = tl.load(q + head_row[:, None] * D + channel, mask=real[:, None], other=0.0)
    upstream = tl.load(grad + head_row[:, None] * D + channel, mask=real[:, None], other=0.0)
    log = tl.load(lse + head_row, mask=real, other=0.0) * 1.4426950408889634
    log = tl.where(log == float("-inf"), 0.0, log)
    inner = tl.load(delta + head_row, mask=real, other=0.0)
    kv = (batch.to(tl.int64) * num_keys * KV_HEADS + kv_head) * D
    entries = (batch.to(tl.int64) * tl.num_programs(0) + tile) * capacity
    acc = tl.zeros((TILE * PART, D), tl.float32)
    for i in range(0, tl.load(counts + batch * tl.num_programs(0) + tile), BLOCK):
        entry = entries + i + tl.arange(0, BLOCK)
        key, word = tl.load(list_keys + entry), tl.load(list_words + entry)
        place = kv + key.to(tl.int64)[:, None] * (KV_HEADS * D) + channel
        keys, values = tl.load(k + place), tl.load(v + place)
        logits = tl.dot(queries, tl.trans(keys), input_precision="ieee") * (scale * 1.4426950408889634)
        p = tl.where(((word[None, :] >> bit[:, None]) & 1) != 0, tl.exp2(logits - log[:, None]), 0.0)
        dp = tl.dot(upstream, tl.trans(values), input_precision="ieee")
        ds = p * (dp - inner[:, None]) * scale
        ds = ds.to(keys.dtype) if ROUNDED else ds
        acc = tl.dot(ds, keys, acc, input_precision="ieee")
        p = p.to(keys.dtype) if ROUNDED else p
        wanted = (word != 0)[:, None]
        add(dv, place, tl.dot(tl.trans(p), upstream, input_precision="ieee"), wanted, dv_unit, FIXED)
        add(dk, place, tl.dot(tl.trans(ds), queries, input_precision="ieee"), wanted, dk_unit, FIXED)
    tl.store(dq + head_row[:, None] * D + channel, acc, mask=real[:, None])


@triton.jit
def _products(grad, out, delta, rows, D: tl.constexpr, ROWS: tl.constexpr):
    """Σ grad · out of each row of D."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = row[:, None] * D + tl.arange(0, D)
    wanted = (row < rows)[:, None]
    x, y = tl.load(grad + place, mask=wanted, other=0.0), tl.load(out + place, mask=wanted, other=0.0)
    tl.store(delta + row, tl.sum(x.to(tl.float32) * y.to(tl.float32), 1), mask=row < rows)
