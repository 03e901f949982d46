"""The best keys of queries: `kernels.scan` and `kernels.choose` together, and in plain PyTorch what they compute."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import choose, marks, scan
from kernels import rows as rows_
from kernels.few import FEW, NOT_VISIBLE, Limits, choose_few, scores_of_few, unordered
from kernels.rule import Asked, Rule, Scores, scores_definition
from kernels.scores import KINDS
from kernels.support import INTERPRET, cdiv, next_power_of_2, runs_triton, tuned
from kernels.unions import queries_at_once, unions
from kernels.words import WORD, pack, unpack

SAMPLES = 4096  # of a query at most
SURE = 6  # deviations that one 128K forward in 700 exceeds
# A bound is so many deviations lower than the samples say, and a ceiling as many higher. From as many keys on, where a
# mark less of each query gains more than it costs to find three in a thousand among all keys again, it is less, and one
# of so many may be found by `kernels.few`.
LIKELY, MANY, OF_ONE_PLACE = (1, 64, 8) if INTERPRET else (3, 2**15, 160)
MARKS = 3 * 2**29  # bytes of marks that exist at one time
PAIRS = 2**30  # of queries and keys whose scores the definition has at hand

Options = dict[str, int | bool]
Candidates = Callable[[slice], Tensor]  # the words of some of the queries' candidates


class Task(NamedTuple):
    """Whose best keys are wanted; as the arguments of `best`."""

    scores: Scores
    asked: Asked
    reference: Tensor | None
    rule: Rule
    most: int
    candidates: Candidates | None


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
    words = torch.zeros(batch, -(-rows // WORD), scores.k.shape[1], dtype=torch.int32, device=scores.q.device)
    statistic = torch.zeros(batch, rows, dtype=torch.float32, device=words.device)
    find = _best_definition
    if runs_triton(scores.q):
        if rows <= FEW:
            find = _best_of_few
        else:
            find = _best_of_rows if words.shape[2] <= rows_.ROOM else _best_triton
    if words.numel():
        find(Task(scores, asked, reference, rule, most, candidates), words, statistic)
    if rule.controller == "threshold":
        statistic.zero_()  # it is the number itself
    return words, statistic


def _parts(rows: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def marked_at_once(batch: int, rows: int, room: int) -> int:
    """Of how many queries of each row marks exist at one time: a multiple of 128, and much the same each time."""
    parts = -(-8 * batch * rows * room // MARKS)
    return -(-rows // (parts * marks.TILE)) * marks.TILE


def _best_definition(task: Task, words: Tensor, statistic: Tensor) -> None:
    """What `_best_triton` computes, with every score at hand."""
    scores, asked, reference, rule, _, candidates = task
    for part in _parts(asked.lasts.shape[1], queries_at_once(len(words), words.shape[2], PAIRS)):
        open_ = None if candidates is None else candidates(part)
        chosen, found = _chosen(scores.rows(part), asked.rows(part), reference, rule, open_)
        words[:, part.start // WORD : -(-part.stop // WORD)] = pack(chosen)
        statistic[:, part] = found


def _chosen(
    scores: Scores, asked: Asked, reference: Tensor | None, rule: Rule, candidates: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Booleans [B, R, S] and the statistic [B, R]."""
    key = torch.arange(scores.k.shape[1], device=scores.k.device)
    start, last = asked.starts[..., None], asked.lasts[..., None]
    visible = (key >= start) & (key <= last)
    if candidates is not None:
        visible &= unpack(candidates, asked.lasts.shape[1])
    forced = visible & _forced(key, asked, rule)
    values = scores_definition(scores, rule.kind)
    number = visible.sum(-1)
    statistic = _statistic(values, visible, asked, rule)
    kept = _number(asked, statistic, reference, rule, number)
    ranked = values.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    ranked = ranked.masked_fill(forced, torch.finfo(values.dtype).max).masked_fill(~visible, -math.inf)
    by_score = ranked.argsort(dim=-1, descending=True, stable=True)
    by_score = by_score.gather(-1, visible.gather(-1, by_score).logical_not().int().argsort(dim=-1, stable=True))
    return torch.zeros_like(visible).scatter_(-1, by_score, key < kept[..., None]), statistic


def _forced(key: Tensor, asked: Asked, rule: Rule) -> Tensor:
    start, last = asked.starts[..., None], asked.lasts[..., None]
    return (key > last - rule.local_window) | (key < start + rule.sink_tokens)


def _statistic(values: Tensor, visible: Tensor, asked: Asked, rule: Rule) -> Tensor:
    """What the rule's controller goes by, [B, R] fp32, of scores [B, R, S]."""
    number = visible.sum(-1)
    values = values.masked_fill(~visible, 0)
    if rule.controller == "variance":
        mean = values.sum(-1) / number.clamp_min(1)
        statistic = ((values - mean[..., None]).square() * visible).sum(-1) / number.clamp_min(1)
    elif rule.controller == "entropy":
        log_p = (rule.tau * values).masked_fill(~visible, torch.finfo(values.dtype).min).log_softmax(-1)
        statistic = -(log_p.exp() * log_p.masked_fill(~visible, 0)).sum(-1)
    elif rule.controller == "threshold":
        key = torch.arange(values.shape[2], device=values.device)
        statistic = (((values >= rule.threshold) | _forced(key, asked, rule)) & visible).sum(-1)
    else:
        return torch.zeros_like(number, dtype=torch.float32)
    return statistic.float()


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


def _best_triton(task: Task, words: Tensor, statistic: Tensor) -> None:
    """Set the bits of the best keys in `words` [B, ⌈R/32⌉, S], which are 0, and fill in `statistic` [B, R]."""
    scores, asked, reference, rule, most, candidates = task
    batch, rows, heads, size = scores.q.shape
    num_keys, device = scores.k.shape[1], words.device
    listed, given = candidates is not None, rule.controller == "given"
    plan = Sampling.of(most, num_keys, given)
    samples = cdiv(num_keys, plan.stride)
    launch = Launch.of(scores, rule, listed, plan)
    forced = (rule.local_window, rule.sink_tokens)
    step = marked_at_once(batch, rows, plan.room)
    if listed:  # as many queries as there may be lists of candidates at one time
        step = min(step, queries_at_once(batch, num_keys) // marks.TILE * marks.TILE or marks.TILE)

    # All that can be said before a score is known is said for all queries at once; the rest is one chunk after another.
    starts, lasts, wanted, ranks, tops, ceilings, ends, walks = _prepared(asked, rule, most, plan)
    scores = scores._replace(k=scores.k.contiguous())
    for part in _parts(rows, step):
        in_words = slice(part.start // WORD, -(-part.stop // WORD))
        chosen, count = words[:, in_words], part.stop - part.start
        grid = (cdiv(count, WORD), batch)
        lists: tuple[Tensor, Tensor, Tensor] = (words, words, words)  # not read
        open_ = None if candidates is None else candidates(part).contiguous()
        if open_ is not None:
            lists = unions(open_, ends[:, in_words].contiguous(), WORD, num_keys)
        capacity = lists[0].shape[2] if listed else 0
        inputs = _inputs(scores.rows(part), starts[:, part], lasts[:, part])
        highest = ceilings[:, part].contiguous()
        bounds = torch.full((batch, count), math.nan, dtype=torch.float32, device=device)
        if num_keys > plan.room:
            sampled = torch.empty(batch, count, samples, dtype=torch.float32, device=device)
            lengths = torch.empty(batch, grid[0], dtype=torch.int32, device=device)
            scan.sample[grid](
                *inputs, *lists, sampled, lengths, count, num_keys, capacity, plan.stride, samples, **launch.sample
            )
            scan.bound[(count, batch)](
                sampled, lengths, ranks[:, part].contiguous(), tops[:, part].contiguous(), bounds, highest, count,
                samples, grid[0], TILE=WORD, P=next_power_of_2(samples), num_warps=2,
            )  # fmt: skip
            del sampled
        tiles = cdiv(count, marks.TILE)
        padded = tiles * marks.TILE
        marked = torch.empty(batch, padded, plan.room, dtype=torch.int64, device=device)
        counts, sures = torch.empty(2, batch, padded, dtype=torch.int32, device=device)
        numbers = torch.empty(batch, count, dtype=torch.int32, device=device)
        found = torch.empty(batch, count, dtype=torch.float32, device=device)
        controls = (plan.room, rule.tau, rule.threshold)
        if launch.roles:
            of_part = walks[:, part.start // marks.TILE :][:, :tiles].contiguous()
            written = (chosen, words.stride(0), marked, counts, sures, found)
            marks.mark_tiles(inputs, of_part, bounds, highest, written, forced, controls, launch.roles)
        else:
            scan.mark[(cdiv(count, launch.mark["M"]), batch)](
                *inputs, *lists, bounds, highest, chosen, words.stride(0), marked, counts, sures, numbers, found,
                *forced, count, padded, num_keys, capacity, *controls, SUM=scan.SUMS[rule.controller], **launch.mark,
            )  # fmt: skip
        want = wanted[:, part].contiguous()
        if not given or listed:
            number = numbers if listed else asked.available[:, part]
            want = _number(asked.rows(part), found, reference, rule, number).int().contiguous()
        if not given:
            statistic[:, part] = found

        states = torch.empty_like(numbers)
        marked = marked.view(torch.int32)  # pairs of key and score
        best_of = (marked, counts, sures, want, chosen, words.stride(0), states, count, padded, num_keys, plan.room)
        choose.choose[(count, batch)](*best_of, **launch.choose)
        if plan.room > launch.choose["P"] + launch.choose["REST"]:
            long: Options = {"ROWS": 32, "P": 16 if INTERPRET else 1024, "num_warps": 4}
            choose.choose_long[(cdiv(count, 32), batch)](*best_of, **long)
        num_places = plan.places(count)
        if num_places:
            places = torch.full((batch, num_places), -1, dtype=torch.int32, device=device)
            taken, block = torch.full((batch,), -1, dtype=torch.int32, device=device), 16 if INTERPRET else 1024
            choose.single_out[(cdiv(count, block), batch)](states, places, taken, count, num_places, BLOCK=block)
            values = scores_of_few(inputs, open_, _shape(scores, rule), places)
            limits = Limits(*forced, 0, num_keys)
            choose_few(values, inputs[-2], inputs[-1], want, limits, chosen, words.stride(0), places)
        choose.search[(cdiv(count, 16), batch)](
            *inputs, *lists, bounds, want, chosen, words.stride(0), states, *forced, count, num_keys, capacity, M=16,
            **launch.search,
        )  # fmt: skip


def _prepared(asked: Asked, rule: Rule, most: int, plan: "Sampling") -> tuple[Tensor, ...]:
    """In int32: starts, lasts, how many keys are wanted, at most or as `given`, and the ranks of the bound and of the
    ceiling among the samples, 0 for none, all [B, R]; ceilings without samples, [B, R] fp32; the first key [B, ⌈R/32⌉]
    that no query of a word sees, nor any later one; and [B, ⌈R/128⌉, 4] of tiles: where their walks begin and end, and
    between which keys all may choose and none must."""
    batch, rows = asked.lasts.shape
    given = [x if x.stride(1) == 1 else x.contiguous() for x in (asked.starts, asked.lasts, asked.wanted)]
    found = torch.empty(5, batch, rows, dtype=torch.int32, device=asked.lasts.device)
    ceilings = torch.empty(batch, rows, dtype=torch.float32, device=found.device)
    ends = torch.empty(batch, cdiv(rows, WORD), dtype=torch.int32, device=found.device)
    walks = torch.empty(batch, cdiv(rows, marks.TILE), 4, dtype=torch.int32, device=found.device)
    scan.prepare[(cdiv(rows, 8 * WORD), batch)](
        *given, *found, ceilings, ends, walks, *(x.stride(0) for x in given), rows, ends.shape[1], walks.shape[1], most,
        rule.k_min, rule.k_max, rule.local_window, rule.sink_tokens, plan.room, plan.stride, SIGMAS=plan.sigmas,
        GIVEN=rule.controller == "given", BLOCK=8 * WORD,
    )  # fmt: skip
    return *found, ceilings, ends, walks


def _best_of_few(task: Task, words: Tensor, statistic: Tensor) -> None:
    """What `_best_triton` does, for no more than `FEW` queries (`kernels.few`)."""
    scores, asked, reference, rule, _, candidates = task
    rows = asked.lasts.shape[1]
    open_ = None if candidates is None else candidates(slice(0, rows))
    inputs = _inputs(scores, asked.starts.int(), asked.lasts.int())
    starts, lasts = inputs[-2:]
    values = scores_of_few(inputs, open_, _shape(scores, rule))
    wanted, limits = asked.wanted, Limits(rule.local_window, rule.sink_tokens, rule.k_min, rule.k_max)
    if rule.controller != "given" or open_ is not None:
        key = torch.arange(words.shape[2], device=words.device)
        visible = (key >= starts[..., None]) & (key <= lasts[..., None]) & (values != NOT_VISIBLE)
        statistic.copy_(_statistic(unordered(values), visible, asked, rule))
        wanted = _number(asked, statistic, reference, rule, visible.sum(-1))
        limits = limits._replace(k_min=0, k_max=words.shape[2])
    choose_few(values, starts, lasts, wanted.int().contiguous(), limits, words, words.stride(0))


def _best_of_rows(task: Task, words: Tensor, statistic: Tensor) -> None:
    """What `_best_triton` does, for no more than `rows.ROOM` keys (`kernels.rows`)."""
    scores, asked, reference, rule, _, candidates = task
    num_keys = words.shape[2]
    for part in _parts(asked.lasts.shape[1], queries_at_once(len(words), num_keys, rows_.PAIRS)):
        open_ = None if candidates is None else candidates(part)
        asked_here = asked.rows(part)
        inputs = _inputs(scores.rows(part), asked_here.starts.int(), asked_here.lasts.int())
        starts, lasts = inputs[-2:]
        values = scores_of_few(inputs, open_, _shape(scores, rule), many=True)
        wanted, limits = asked_here.wanted, Limits(rule.local_window, rule.sink_tokens, rule.k_min, rule.k_max)
        if rule.controller != "given" or open_ is not None:
            kind = scan.SUMS[rule.controller]
            found, number = rows_.sums_of_rows(values, starts, lasts, limits, kind, rule.tau, rule.threshold)
            statistic[:, part] = found
            wanted = _number(asked_here, found, reference, rule, number)
            limits = limits._replace(k_min=0, k_max=num_keys)
        chosen = words[:, part.start // WORD : -(-part.stop // WORD)]
        rows_.choose_rows(values, starts, lasts, wanted.int().contiguous(), limits, chosen, words.stride(0))


def _inputs(scores: Scores, starts: Tensor, lasts: Tensor) -> tuple[Tensor, ...]:
    """What every kernel that scores takes first."""
    none = torch.empty(0, dtype=torch.float32, device=scores.q.device)
    weight, bias = scores.weight, scores.bias
    return (
        scores.q.contiguous(), scores.k.contiguous(), none if weight is None else weight.contiguous(),
        none if bias is None else bias, starts.contiguous(), lasts.contiguous(),
    )  # fmt: skip


def _shape(scores: Scores, rule: Rule) -> Options:
    """What a kernel's code depends on."""
    heads, size = scores.q.shape[2:]
    return {
        "KIND": KINDS[rule.kind], "HEADS": heads, "D": size, "DP": max(next_power_of_2(size), 16),
        "FAST": not INTERPRET, "RAW": heads == 1 and rule.controller == "given", "N": 16 if INTERPRET else 128,
    }  # fmt: skip


class Launch(NamedTuple):
    """How kernels are launched: the fastest measured on an H100, and what fits elsewhere (`kernels.support.tuned`)."""

    sample: Options
    mark: Options
    roles: Options  # of `kernels.marks`, where it takes the place of `mark`
    choose: Options
    search: Options

    @classmethod
    def of(cls, scores: Scores, rule: Rule, listed: bool, plan: "Sampling") -> "Launch":
        one_head, given = scores.q.shape[2] == 1, rule.controller == "given"
        shape, hopper = _shape(scores, rule), tuned(scores.q)
        keys: Options = {"N": 128 if one_head or (given and not listed) else 64}  # or registers do not suffice
        few: Options = {"N": 64}
        if not hopper:
            keys, few = {"N": 64}, {"N": 32}
        if INTERPRET:
            keys = few = {}
        wide = {**shape, "LISTED": listed, "M": WORD, "num_warps": 8, "num_stages": 3 if hopper else 2, **keys}
        roles: Options = {}
        if not listed and marks.takes(scores.q, scores.k):
            roles = {name: shape[name] for name in ("KIND", "HEADS", "D", "RAW")}
            roles |= marks.PLAIN if given else marks.SUMMING
            roles |= {"SUM": scan.SUMS[rule.controller]}
        mark = wide if one_head or INTERPRET else wide | {"N": 64}
        if not one_head and (INTERPRET or not hopper):
            mark = mark | {"M": WORD // 2}  # or registers do not suffice
        p = min(max(next_power_of_2(plan.likely), 16), 16 if INTERPRET else 8192)
        chosen: Options = {"P": p, "REST": p // 2 if plan.room <= p * 3 // 2 else p, "num_warps": max(p // 512, 1)}
        if not INTERPRET:
            chosen["maxnreg"] = 96  # ptxas makes 80 of it on sm_90: three programs of 4096 at a time
        return cls(wide, mark, roles, chosen, {**shape, "LISTED": listed, "num_warps": 8, **few})


class Sampling(NamedTuple):
    """How a bound is taken, and a ceiling where numbers are `given`: from every `stride`-th key, so that at most `room`
    keys of a query are between them."""

    stride: int
    sigmas: int
    likely: int  # most queries have no more marked keys
    room: int

    @classmethod
    def of(cls, most: int, num_keys: int, given: bool) -> "Sampling":
        stride = max(next_power_of_2(most) // 128, next_power_of_2(cdiv(num_keys, SAMPLES)), 4)
        sigmas = LIKELY if num_keys >= MANY else SURE
        spread = sigmas * math.sqrt(most / stride) + 2
        rank = most / stride + spread
        between = rank * 17 / 16  # what `scan.bound` allows itself
        if given:
            between -= max(most / stride - spread - 1, 0) * 15 / 16
        # also for all keys of a query that has too few for a sample of that rank
        room = max(math.ceil(stride * (between + SURE * math.sqrt(between))), math.ceil(stride * (rank + 1)), 64)
        return cls(stride, sigmas, math.ceil(stride * between), min(room, num_keys))

    def places(self, rows: int) -> int:
        """For how many of `rows` queries there is room whose bounds fail."""
        return cdiv(rows, OF_ONE_PLACE) if self.sigmas < SURE else 0
