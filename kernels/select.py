"""Selection: each query's k best keys by indexer score, as words (`kernels.words`).

`select` is what a layer of gated sparse attention does between projecting its indexer and attending: score, decide on k
and take the best, in one or two levels, for every query or for the first of each window. `kernels.scan` finds the best.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels import scan
from kernels.support import INTERPRET, runs_triton
from kernels.unions import unions
from kernels.windows import Windows
from kernels.words import WORD, pack, unpack

CHUNK = 4096  # queries handled at once: bounds the memory of samples and of marked scores
SAMPLES = 4096  # of a query at most
SIGMAS = 5  # a bound is this many deviations lower than the samples say
FEW = 8  # queries whose marked scores are chosen from together


@dataclasses.dataclass(frozen=True)
class Rule:
    """How scores become a selection: indexer kind, controller and options of selection, named as in GSA's settings.

    The controller `given` takes the numbers of keys from the caller.
    """

    kind: str = "gated_sigmoid"  # gated_sigmoid, sigmoid, relu
    controller: str = "given"  # given, threshold, variance, entropy
    k: int = 2048
    k_min: int = 1
    k_max: int = 2048
    temperature: float = 1.0  # of variance and entropy
    tau: float = 10.0  # factor on scores in the entropy's softmax
    threshold: float = 1.0
    local_window: int = 0
    sink_tokens: int = 0
    share: int = 1
    block: int = 0  # keys of a block on the first of two levels; 0: one level
    candidates: int = 8  # keys scored on the second level, as a multiple of k

    def most(self, num_keys: int) -> int:
        """A bound on the keys that a query selects, before windows are shared."""
        most = self.k_max
        if self.controller in ("variance", "entropy"):
            most = min(most, max(self.k_min, math.ceil(1.5 * self.k)))
        return min(num_keys, max(most, self.local_window + self.sink_tokens))

    def most_attended(self, num_keys: int) -> int:
        """A bound on the keys that a query attends to."""
        return min(num_keys, self.most(num_keys) + (self.share if self.share > 1 else 0))

    def blocks(self, nominal: Any) -> Any:
        """How many of the best blocks are looked into, for a nominal number of keys."""
        return (nominal * self.candidates + self.block - 1) // self.block


class Scores(NamedTuple):
    """What indexer scores are made of, for R queries and S keys."""

    q: Tensor  # [B, R, H_I, d_I]
    k: Tensor  # [B, S, d_I]
    weight: Tensor | None  # [B, R, H_I]
    bias: Tensor | None  # [H_I]

    def at(self, rows: Tensor) -> "Scores":
        """Those of the queries whose numbers are `rows` [B, R']."""
        q = self.q.gather(1, rows[..., None, None].expand(-1, -1, *self.q.shape[2:]))
        weight = self.weight
        if weight is not None:
            weight = weight.gather(1, rows[..., None].expand(-1, -1, weight.shape[2]))
        return self._replace(q=q, weight=weight)

    def rows(self, rows: slice) -> "Scores":
        return self._replace(q=self.q[:, rows], weight=None if self.weight is None else self.weight[:, rows])


class Asked(NamedTuple):
    """What R queries may choose from and how much."""

    starts: Tensor  # [B, R] the first key that a query sees
    lasts: Tensor  # [B, R] and the last; less than the first where it sees none
    nominal: Tensor  # [B, R] the number of keys by which candidates are counted
    wanted: Tensor  # [B, R] the number of keys wanted, where the rule's controller is `given`

    def at(self, rows: Tensor) -> "Asked":
        return Asked(*(x.gather(1, rows) for x in self))

    def rows(self, rows: slice) -> "Asked":
        return Asked(*(x[:, rows] for x in self))

    @property
    def available(self) -> Tensor:
        return (self.lasts - self.starts + 1).clamp_min(0)


@torch.library.custom_op("gsa::select", mutates_args=())
def select(
    q: Tensor,
    k: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    starts: Tensor,
    nominal: Tensor,
    wanted: Tensor,
    reference: Tensor | None,
    leader: Tensor | None,
    kind: str = "gated_sigmoid",
    controller: str = "given",
    k_base: int = 2048,
    k_min: int = 1,
    k_max: int = 2048,
    temperature: float = 1.0,
    tau: float = 10.0,
    threshold: float = 1.0,
    local_window: int = 0,
    sink_tokens: int = 0,
    share: int = 1,
    block: int = 0,
    candidates: int = 8,
) -> tuple[Tensor, Tensor, Tensor]:
    """Select keys for the last T of S tokens.

    Args:
        q: [B, T, H_I, d_I] indexer queries.
        k: [B, S, d_I] indexer keys.
        weight: [B, T, H_I] head weights, for all kinds but `sigmoid`.
        bias: [H_I], for all kinds but `relu`.
        starts: [B, S] the first key of each token's document.
        nominal: [B, T] the number of keys by which the candidates of two levels are counted.
        wanted: [B, T] the number of keys wanted, read where the controller is `given`.
        reference: the running mean that `variance` and `entropy` compare with.
        leader: [B, S'] bool, S' ≤ S: the selection of the window that is open when the queries begin.
        kind: and all that follow, see `Rule`.

    Returns:
        words [B, ⌈T/32⌉, S] int32; the statistic [B, T] fp32 of `variance` and `entropy`, else 0; with share > 1 the
        selection [B, S] bool of the last query's window, else [B, 0].
    """
    rule = Rule(kind, controller, k_base, k_min, k_max, temperature, tau, threshold, local_window, sink_tokens, share,
                block, candidates)  # fmt: skip
    return _select(Scores(q, k, weight, bias), starts, nominal, wanted, reference, leader, rule)


@select.register_fake
def _(
    q: Tensor,
    k: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    starts: Tensor,
    nominal: Tensor,
    wanted: Tensor,
    reference: Tensor | None,
    leader: Tensor | None,
    kind: str = "gated_sigmoid",
    controller: str = "given",
    k_base: int = 2048,
    k_min: int = 1,
    k_max: int = 2048,
    temperature: float = 1.0,
    tau: float = 10.0,
    threshold: float = 1.0,
    local_window: int = 0,
    sink_tokens: int = 0,
    share: int = 1,
    block: int = 0,
    candidates: int = 8,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, keys = q.shape[0], q.shape[1], k.shape[1]
    words = q.new_empty(batch, (length + WORD - 1) // WORD, keys, dtype=torch.int32)
    statistic = q.new_empty(batch, length, dtype=torch.float32)
    return words, statistic, q.new_empty(batch, keys if share > 1 else 0, dtype=torch.bool)


def _select(
    scores: Scores,
    starts: Tensor,
    nominal: Tensor,
    wanted: Tensor,
    reference: Tensor | None,
    leader: Tensor | None,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length = nominal.shape
    num_keys = scores.k.shape[1]
    positions = torch.arange(num_keys - length, num_keys, device=scores.q.device).expand(batch, -1)
    asked = Asked(starts[:, num_keys - length :], positions, nominal, wanted)
    if rule.share == 1 or not length:
        words, statistic = _one_or_two_levels(scores, starts, asked, reference, rule)
        return words, statistic, torch.empty(batch, 0, dtype=torch.bool, device=words.device)

    # Only the first query of a window selects: those queries alone are handled, then their selections are spread.
    leads = (positions - asked.starts) % rule.share == 0
    count = leads.sum(1)
    rows = leads.logical_not().int().argsort(dim=1, stable=True)[:, : int(count.max())]
    led = asked.at(rows)
    real = torch.arange(rows.shape[1], device=rows.device) < count[:, None]
    led = led._replace(lasts=torch.where(real, led.lasts, -1))
    words, found = _one_or_two_levels(scores.at(rows), starts, led, reference, rule)
    statistic = torch.zeros(batch, length, dtype=torch.float32, device=words.device).scatter_(1, rows, found)
    windows = Windows.of(asked.starts, num_keys, rule.share)
    words, leader = windows.share(words, leads.cumsum(1) - 1, leader)
    return words, torch.where(leads, statistic, 0.0), leader


def _one_or_two_levels(
    scores: Scores, starts: Tensor, asked: Asked, reference: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Words [B, ⌈R/32⌉, S] and statistic [B, R] of queries that each select for themselves."""
    num_keys = scores.k.shape[1]
    most = rule.most(num_keys)
    if not rule.block or not asked.lasts.shape[1]:
        return best(scores, asked, reference, rule, most, None)
    pooled, of_key = pool(scores.k, starts, rule.block)
    lasts = asked.lasts.clamp_min(0)
    own, first = of_key.gather(1, lasts), of_key.gather(1, torch.minimum(asked.starts, lasts))
    number = torch.minimum(rule.blocks(asked.nominal), own - first)
    coarse = Asked(first, torch.where(asked.available > 0, own - 1, -1), number, number)
    level = dataclasses.replace(
        rule, controller="given", k_min=0, k_max=rule.blocks(most), local_window=0, sink_tokens=0
    )
    chosen, _ = best(scores._replace(k=pooled), coarse, None, level, level.most(pooled.shape[1]), None)
    # its own block, the one before and what is forced are candidates whatever the scores say
    near = lasts - (lasts - asked.starts) % rule.block - rule.block
    near = torch.maximum(asked.starts, torch.minimum(near, lasts - rule.local_window + 1))
    sinks = torch.minimum(asked.starts + rule.sink_tokens, asked.lasts + 1)

    def candidates(rows: slice) -> Tensor:
        words = chosen[:, rows.start // WORD : -(-rows.stop // WORD)]
        return _widen(words, of_key, near[:, rows], sinks[:, rows], asked.rows(rows))

    return best(scores, asked, reference, rule, most, candidates)


def pool(keys: Tensor, starts: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Mean keys [B, N, d] of blocks that are counted from the start of each document, and each key's block [B, S]."""
    begins = (torch.arange(keys.shape[1], device=keys.device) - starts) % size == 0
    begins[:, :1] = True  # also where padding stands before the first document
    of_key = begins.cumsum(1) - 1
    total = torch.zeros(keys.shape[0], int(of_key.max()) + 1, keys.shape[2], device=keys.device,
                        dtype=torch.promote_types(keys.dtype, torch.float32))  # fmt: skip
    total.scatter_add_(1, of_key[..., None].expand_as(keys), keys.to(total.dtype))
    members = total.new_zeros(total.shape[:2]).scatter_add_(1, of_key, torch.ones_like(keys[..., 0], dtype=total.dtype))
    return (total / members.clamp_min(1)[..., None]).to(keys.dtype), of_key


Candidates = Callable[[slice], Tensor]  # the words of some of the queries' candidates


def best(
    scores: Scores, asked: Asked, reference: Tensor | None, rule: Rule, most: int, candidates: Candidates | None
) -> tuple[Tensor, Tensor]:
    """The best keys of each query as words [B, ⌈R/32⌉, S], and the statistic [B, R] that its number was chosen by.

    Args:
        scores: of R queries and S keys.
        asked: what the queries may choose from.
        reference: of the statistic.
        rule: kind, controller and forced keys; nothing else is read.
        most: a bound on the number of keys of any query.
        candidates: gives the words of the queries' candidates; `None`: all keys are.
    """
    batch, rows = asked.lasts.shape
    num_keys = scores.k.shape[1]
    words = torch.zeros(batch, -(-rows // WORD), num_keys, dtype=torch.int32, device=scores.q.device)
    statistic = torch.zeros(batch, rows, dtype=torch.float32, device=words.device)
    step = max(CHUNK // max(batch, 1) // 64, 1) * 64
    for first in range(0, rows if num_keys else 0, step):
        part = slice(first, min(first + step, rows))
        chosen = words[:, first // WORD : -(-part.stop // WORD)]
        open_ = candidates(part) if candidates else None
        find = _best_triton if runs_triton(scores.q) else _best_definition
        statistic[:, part] = find(scores.rows(part), asked.rows(part), reference, rule, most, open_, chosen)
    return words, statistic


def scores_definition(scores: Scores, kind: str) -> Tensor:
    """I[t, s] = Σ_j w[t, j] · σ(q[t, j]·k[s] / √d_I + b_j), [B, R, S] in fp32 or better; `relu` has no bias."""
    precise = torch.promote_types(scores.q.dtype, torch.float32)
    each = torch.einsum("brjd,bsd->brjs", scores.q.to(precise), scores.k.to(precise)) / math.sqrt(scores.q.shape[3])
    if kind == "relu":
        each = each.relu()
    elif scores.bias is not None:
        each = (each + scores.bias.to(precise)[:, None]).sigmoid()
    return each.sum(2) if scores.weight is None else torch.einsum("brjs,brj->brs", each, scores.weight.to(precise))


def _best_definition(
    scores: Scores,
    asked: Asked,
    reference: Tensor | None,
    rule: Rule,
    most: int,
    candidates: Tensor | None,
    words: Tensor,
) -> Tensor:
    """What `_best_triton` computes, with every score at hand."""
    key = torch.arange(scores.k.shape[1], device=words.device)
    start, last = asked.starts[..., None], asked.lasts[..., None]
    visible = (key >= start) & (key <= last)
    if candidates is not None:
        visible &= unpack(candidates, asked.lasts.shape[1])
    forced = visible & ((key > last - rule.local_window) | (key < start + rule.sink_tokens))
    values = scores_definition(scores, rule.kind)
    number = visible.sum(-1)
    statistic = torch.zeros_like(number, dtype=torch.float32)
    if rule.controller == "variance":
        mean = (values * visible).sum(-1) / number.clamp_min(1)
        statistic = ((values - mean[..., None]).square() * visible).sum(-1) / number.clamp_min(1)
    elif rule.controller == "entropy":
        log_p = (rule.tau * values).masked_fill(~visible, torch.finfo(values.dtype).min).log_softmax(-1)
        statistic = -(log_p.exp() * log_p.masked_fill(~visible, 0)).sum(-1)
    elif rule.controller == "threshold":
        statistic = ((values >= rule.threshold) & visible | forced).sum(-1).float()
    kept = _number(asked, statistic, reference, rule, number)
    ranked = values.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    ranked = ranked.masked_fill(forced, torch.finfo(values.dtype).max).masked_fill(~visible, -math.inf)
    by_score = ranked.argsort(dim=-1, descending=True, stable=True)
    by_score = by_score.gather(-1, visible.gather(-1, by_score).logical_not().int().argsort(dim=-1, stable=True))
    chosen = torch.zeros_like(visible).scatter_(-1, by_score, key < kept[..., None])
    words |= pack(chosen)
    return statistic if rule.controller in ("variance", "entropy") else torch.zeros_like(statistic)


def _number(asked: Asked, statistic: Tensor, reference: Tensor | None, rule: Rule, number: Tensor) -> Tensor:
    """k_t [B, R]: what the controller wants, in [k_min, k_max], no fewer than forced, no more than there are."""
    if rule.controller == "given":
        wanted = asked.wanted.to(torch.long)
    elif rule.controller == "threshold":
        wanted = statistic.long()
    else:
        assert reference is not None
        relative = statistic.double() / reference.double().clamp_min(1e-12)
        wanted = (rule.k * (0.5 + 1 / (1 + rule.temperature * relative))).nan_to_num(nan=rule.k).ceil().long()
    available = asked.available
    forced = torch.minimum(available, available.clamp_max(rule.local_window) + available.clamp_max(rule.sink_tokens))
    return torch.minimum(torch.maximum(wanted.clamp(rule.k_min, rule.k_max), forced), number)


def _best_triton(
    scores: Scores,
    asked: Asked,
    reference: Tensor | None,
    rule: Rule,
    most: int,
    candidates: Tensor | None,
    words: Tensor,
) -> Tensor:
    """Set the bits of the best keys in `words` [B, ⌈R/32⌉, S], which are 0; returns the statistic [B, R]."""
    batch, rows, heads, size = scores.q.shape
    num_keys, device = scores.k.shape[1], words.device
    plan = Sampling.of(most, num_keys)
    listed = candidates is not None
    ends = F.pad(asked.lasts + 1, (0, -rows % WORD)).unflatten(1, (-1, WORD)).amax(2).int()
    lists: tuple[Tensor, Tensor, Tensor] = (words, words, words)  # not read
    if candidates is not None:
        lists = unions(candidates, ends, WORD, num_keys)
    capacity = lists[0].shape[2] if listed else 0
    none = torch.empty(0, dtype=torch.float32, device=device)
    inputs = (
        scores.q.contiguous(), scores.k.contiguous(), none if scores.weight is None else scores.weight.contiguous(),
        none if scores.bias is None else scores.bias, asked.starts.int().contiguous(), asked.lasts.int().contiguous(),
    )  # fmt: skip
    shape = {
        "KIND": scan.KINDS[rule.kind], "HEADS": heads, "D": size, "DP": max(triton.next_power_of_2(size), 16),
        "FAST": not INTERPRET, "RAW": heads == 1 and rule.controller == "given",
    }  # fmt: skip
    wide = {"LISTED": listed, "M": WORD, "N": 16 if INTERPRET else 128, "num_warps": 8, "num_stages": 3, **shape}
    forced, sizes = (rule.local_window, rule.sink_tokens), (rows, num_keys, capacity)
    grid = (triton.cdiv(rows, WORD), batch)
    numbers = torch.empty(batch, rows, dtype=torch.int32, device=device)
    statistic = torch.zeros(batch, rows, dtype=torch.float32, device=device)
    given = rule.controller == "given"
    wanted = _number(asked, statistic, None, rule, asked.available) if given else asked.available.clamp_max(most)

    bounds = torch.full((batch, rows), math.nan, dtype=torch.float32, device=device)
    if num_keys > plan.room:
        ranks = torch.where(asked.available > plan.room, plan.rank(wanted), 0)
        samples = torch.empty(batch, rows, triton.cdiv(num_keys, plan.stride), dtype=torch.float32, device=device)
        lengths = torch.empty(batch, grid[0], dtype=torch.int32, device=device)
        scan.sample[grid](*inputs, *lists, samples, lengths, *sizes, plan.stride, samples.shape[2], **wide)
        scan.bound[(rows, batch)](
            samples, lengths, ranks, bounds, rows, samples.shape[2], grid[0], TILE=WORD,
            P=triton.next_power_of_2(samples.shape[2]), num_warps=4,
        )  # fmt: skip
    scan.mark[grid](
        *inputs, *lists, bounds, words, words.stride(0), numbers, statistic, *forced, *sizes, rule.tau, rule.threshold,
        SUM=scan.SUMS[rule.controller], **wide,
    )  # fmt: skip
    wanted = _number(asked, statistic, reference, rule, numbers if listed else asked.available).int()

    marked = unions(words, ends, FEW, min(FEW * plan.room, num_keys))
    room = marked.keys.shape[2]
    values = torch.empty(batch, marked.keys.shape[1], FEW, room, dtype=torch.int32, device=device)
    scan.rescore[(marked.keys.shape[1], batch)](
        *inputs, *marked, values, *forced, rows, num_keys, room, TILE=FEW, N=wide["N"], num_warps=4, **shape
    )
    states = torch.empty(batch, rows, dtype=torch.int32, device=device)
    chosen = (wanted, words, words.stride(0), states)
    marked_scores = (values, marked.keys, marked.counts, *chosen, rows, num_keys, room)
    few, many, some = (16, 32, 16) if INTERPRET else (8192, 16384, 1024)
    scan.choose[(rows, batch)](*marked_scores, TILE=FEW, P=few, DONE_TO=-1, num_warps=8)
    if room > few:
        scan.choose[(rows, batch)](*marked_scores, TILE=FEW, P=many, DONE_TO=few, num_warps=16)
    scan.choose_tied[(rows, batch)](*marked_scores, TILE=FEW, P=some, num_warps=4)
    scan.search[(triton.cdiv(rows, 16), batch)](
        *inputs, *lists, *chosen, *forced, *sizes, M=16, N=wide["N"], LISTED=listed, num_warps=4, **shape
    )
    return statistic if rule.controller in ("variance", "entropy") else torch.zeros_like(statistic)


class Sampling(NamedTuple):
    """How a bound is taken: from every `stride`-th key, so that at most `room` keys of a query exceed it."""

    stride: int
    room: int

    @classmethod
    def of(cls, most: int, num_keys: int) -> "Sampling":
        stride = max(triton.next_power_of_2(most) // 128, triton.next_power_of_2(triton.cdiv(num_keys, SAMPLES)), 4)
        rank = _rank(most / stride)
        return cls(stride, max(math.ceil(stride * (rank + SIGMAS * math.sqrt(rank))), 64))

    def rank(self, wanted: Tensor) -> Tensor:
        """Which of the samples, from above, the bound is, for numbers of keys wanted."""
        expected = wanted.float() / self.stride
        return (expected + SIGMAS * expected.sqrt() + 2).int()


def _rank(expected: float) -> float:
    return expected + SIGMAS * math.sqrt(expected) + 2


def _widen(words: Tensor, of_key: Tensor, near: Tensor, sinks: Tensor, asked: Asked) -> Tensor:
    """Words of candidates: keys of the chosen blocks, from `near` to the query itself, and before `sinks`."""
    batch, rows = asked.lasts.shape
    num_keys = of_key.shape[1]
    if not runs_triton(words):
        key = torch.arange(num_keys, device=words.device)
        mask = unpack(words, rows).gather(2, of_key[:, None].expand(-1, rows, -1)) | (key >= near[..., None])
        mask |= key < sinks[..., None]
        return pack(mask & (key >= asked.starts[..., None]) & (key <= asked.lasts[..., None]))
    out = torch.empty(batch, words.shape[1], num_keys, dtype=torch.int32, device=words.device)
    block = 1024
    _widen_kernel[(words.shape[1], triton.cdiv(num_keys, block), batch)](
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
