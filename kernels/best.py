"""The best keys of queries: which way they are found, and in plain PyTorch what every way computes.

A few queries go to `kernels.few`, those that see few keys to `kernels.rows`, all others to `kernels.enclose`.
"""

import math

import torch
from torch import Tensor

from kernels import rows, scan
from kernels.enclose import best_enclosed
from kernels.few import FEW, NOT_VISIBLE, Limits, choose_few, scores_of_few, unordered
from kernels.rule import Asked, Rule, Scores, scores_definition
from kernels.support import runs_triton
from kernels.task import Candidates, Task, inputs_of, number_wanted, parts, shape_of
from kernels.unions import queries_at_once
from kernels.words import WORD, pack, unpack

PAIRS = 2**30  # of queries and keys whose scores the definition has at hand


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
    batch, count = asked.lasts.shape
    num_keys = scores.k.shape[1]
    few, short = count <= FEW, num_keys <= rows.ROOM
    find = _best_definition
    if runs_triton(scores.q):
        find = _best_at_hand if few or short else best_enclosed
    written = short and not few  # the other ways set bits
    make = torch.empty if written else torch.zeros
    words = make(batch, -(-count // WORD), num_keys, dtype=torch.int32, device=scores.q.device)
    statistic = torch.zeros(batch, count, dtype=torch.float32, device=words.device)
    if words.numel():
        find(Task(scores, asked, reference, rule, most, candidates), words, statistic)
    if rule.controller == "threshold":
        statistic.zero_()  # it is the number itself
    return words, statistic


def _best_definition(task: Task, words: Tensor, statistic: Tensor) -> None:
    """What `best_enclosed` computes, with every score at hand."""
    scores, asked, reference, rule, _, candidates = task
    for part in parts(asked.lasts.shape[1], queries_at_once(len(words), words.shape[2], PAIRS)):
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
    kept = number_wanted(asked, statistic, reference, rule, number)
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


def _best_at_hand(task: Task, words: Tensor, statistic: Tensor) -> None:
    """What `best_enclosed` does, with all scores of some queries written down: for no more than `FEW` of them
    (`kernels.few`), or no more than `rows.ROOM` keys (`kernels.rows`)."""
    scores, asked, reference, rule, _, candidates = task
    count, num_keys = asked.lasts.shape[1], words.shape[2]
    few = count <= FEW
    for part in parts(count, queries_at_once(len(words), num_keys, rows.PAIRS)):
        open_ = None if candidates is None else candidates(part)
        some = asked.rows(part)
        inputs = inputs_of(scores.rows(part), some.starts.int(), some.lasts.int())
        starts, lasts = inputs[-2:]
        values = scores_of_few(inputs, open_, shape_of(scores, rule), many=not few)
        wanted, limits = some.wanted, Limits(rule.local_window, rule.sink_tokens, rule.k_min, rule.k_max)
        if rule.controller != "given" or open_ is not None:
            if few:
                key = torch.arange(num_keys, device=words.device)
                visible = (key >= starts[..., None]) & (key <= lasts[..., None]) & (values != NOT_VISIBLE)
                found, number = _statistic(unordered(values), visible, some, rule), visible.sum(-1)
            else:
                kind = scan.SUMS[rule.controller]
                found, number = rows.sums_of_rows(values, starts, lasts, limits, kind, rule.tau, rule.threshold)
            statistic[:, part] = found
            wanted = number_wanted(some, found, reference, rule, number)
            limits = limits._replace(k_min=0, k_max=num_keys)
        chosen = words[:, part.start // WORD : -(-part.stop // WORD)]
        choose = choose_few if few else rows.choose_rows
        choose(values, starts, lasts, wanted.int().contiguous(), limits, chosen, words.stride(0))
