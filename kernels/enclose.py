"""The best keys of many queries among many keys: each query's k-th score is enclosed by a bound and a ceiling.

`kernels.scan` makes these from samples and marks what is between; `kernels.choose` chooses among the marks.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import choose, marks, scan
from kernels.few import Limits, choose_few, scores_of_few
from kernels.rule import Asked, Rule, Scores
from kernels.support import INTERPRET, cdiv, next_power_of_2, tuned
from kernels.task import Options, Task, inputs_of, number_wanted, parts, shape_of
from kernels.unions import queries_at_once, unions
from kernels.words import WORD

SAMPLES = 4096  # of a query at most
SURE = 6  # deviations that one 128K forward in 700 exceeds
# A bound is so many deviations lower than the samples say, and a ceiling as many higher. From as many keys on, where a
# mark less of each query gains more than it costs to find three in a thousand among all keys again, it is less, and one
# of so many may be found by `kernels.few`.
LIKELY, MANY, OF_ONE_PLACE = (1, 64, 8) if INTERPRET else (3, 2**15, 160)
MARKS = 3 * 2**29  # bytes of marks that exist at one time


def marked_at_once(batch: int, rows: int, room: int) -> int:
    """Of how many queries of each row marks exist at one time: a multiple of 128, and much the same each time."""
    times = -(-8 * batch * rows * room // MARKS)
    return -(-rows // (times * marks.TILE)) * marks.TILE


def best_enclosed(task: Task, words: Tensor, statistic: Tensor) -> None:
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
    for part in parts(rows, step):
        in_words = slice(part.start // WORD, -(-part.stop // WORD))
        chosen, count = words[:, in_words], part.stop - part.start
        grid = (cdiv(count, WORD), batch)
        lists: tuple[Tensor, Tensor, Tensor] = (words, words, words)  # not read
        open_ = None if candidates is None else candidates(part).contiguous()
        if open_ is not None:
            lists = unions(open_, ends[:, in_words].contiguous(), WORD, num_keys)
        capacity = lists[0].shape[2] if listed else 0
        inputs = inputs_of(scores.rows(part), starts[:, part], lasts[:, part])
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
            want = number_wanted(asked.rows(part), found, reference, rule, number).int().contiguous()
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
            values = scores_of_few(inputs, open_, shape_of(scores, rule), places)
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
        shape, hopper = shape_of(scores, rule), tuned(scores.q)
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
