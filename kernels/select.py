"""Selection: each query's k best keys by indexer score, as words (`kernels.words`).

`select` is what a layer of gated sparse attention does between projecting its indexer and attending: score, decide on k
and take the best, in one or two levels (`kernels.levels`), for every query or for the first of each window.
"""

import torch
from torch import Tensor

from kernels.few import FEW
from kernels.levels import one_or_two_levels
from kernels.rule import Asked, Rule, Scores
from kernels.windows import Windows, spread
from kernels.words import WORD


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
    past: Tensor | None,
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
    documents: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Select keys for T of S tokens, the last ones unless `past` says otherwise.

    Args:
        q: [B, T, H_I, d_I] indexer queries.
        k: [B, S, d_I] indexer keys.
        weight: [B, T, H_I] head weights, for all kinds but `sigmoid`.
        bias: [H_I], for all kinds but `relu`.
        starts: [B, S] the first key of each token's document.
        nominal: [B, T] the number of keys by which the candidates of two levels are counted, no less than `k_min`:
            where as many candidates as `k_min` makes are all keys, there is one level.
        wanted: [B, T] the number of keys wanted, read where the controller is `given`.
        reference: the running mean that `variance` and `entropy` compare with.
        leader: [B, S'] bool, S' ≤ S: the selection of the window that is open when the queries begin.
        past: [B] int, how many keys come before the first query, S − T at most. What `k` holds after the last query is
            not looked at: in a cache with room to grow, with `past` on the GPU, no shape depends on the token.
        kind: and all that follow but the last, see `Rule`.
        documents: no row has more; 0: it is not known. To share windows, or for two levels, the host then waits for the
            GPU to count, and a CUDA graph cannot hold it.

    Returns:
        words [B, ⌈T/32⌉, S] int32; the statistic [B, T] fp32 of `variance` and `entropy`, else 0; with share > 1 the
        selection [B, S] bool of the last query's window, else [B, 0].
    """
    rule = Rule(kind, controller, k_base, k_min, k_max, temperature, tau, threshold, local_window, sink_tokens, share,
                block, candidates)  # fmt: skip
    return _select(Scores(q, k, weight, bias), starts, nominal, wanted, reference, leader, past, rule, documents)


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
    past: Tensor | None,
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
    documents: int = 0,
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
    past: Tensor | None,
    rule: Rule,
    documents: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length = nominal.shape
    num_keys = scores.k.shape[1]
    before = num_keys - length if past is None else 0
    positions = torch.arange(before, before + length, dtype=torch.int32, device=starts.device).expand(batch, -1)
    own_starts = starts[:, num_keys - length :]
    if past is not None:
        positions = positions + past[:, None].int()
        own_starts = starts.gather(1, positions.long())
    asked = Asked(own_starts, positions, nominal, wanted)
    if rule.share == 1 or not length:
        words, statistic = one_or_two_levels(scores, starts, asked, reference, rule, documents)
        return words, statistic, torch.empty(batch, 0, dtype=torch.bool, device=words.device)

    # Only the first query of a window selects: those queries alone are handled, then their selections are spread.
    windows = Windows.of(asked, rule.share, _most_windows(asked, rule.share, documents))
    led = scores.at(windows.leaders)
    words, found = one_or_two_levels(led, starts, windows.asked, reference, rule, documents)
    words, leader = spread(words, leader, windows.number, windows.firsts, positions)
    if rule.controller in ("given", "threshold"):
        return words, torch.zeros(batch, length, dtype=found.dtype, device=found.device), leader
    return words, windows.of_queries(found, positions), leader


def _most_windows(asked: Asked, share: int, documents: int) -> int:
    """A bound on the windows that begin in a row of queries."""
    length = asked.lasts.shape[1]
    if length <= FEW:
        return length
    if documents:
        return min(length, length // share + documents)
    return int(((asked.lasts - asked.starts) % share == 0).sum(1).max())
