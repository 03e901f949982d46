"""Which keys are kept: the best, ties to the earlier key, forced ones always, windows as their first query."""

import pytest
import torch
from torch import Tensor

from gsa.attention.attention import GatedSparseAttention
from gsa.attention.controller import ControllerConfig
from gsa.attention.oracle import oracle_attention
from gsa.attention.selection import CoarseConfig, Queries, top_k
from tests.draw import CONTROLLERS, INDEXERS, Draw


def select(layer: GatedSparseAttention, hidden: Tensor, starts: Tensor | None = None) -> Tensor:
    selection = layer.attend(hidden, starts, keep_selection=True).selection
    assert selection is not None
    return selection


def exact_layer(draw: Draw, controller: str, dtype: torch.dtype) -> GatedSparseAttention:
    """A relu layer whose scores are small multiples of ¼, and often equal: integers, d_I = 4, w = σ(0)."""
    config = draw.config(controller, "relu")
    config.indexer.head_dim, config.indexer.rope = 4, False
    config.controller.threshold = draw.random.choice([0.0, 0.25, 1.0, 2.0])
    if config.selection.coarse is not None:
        config.selection.coarse = CoarseConfig(block=draw.random.choice([1, 2, 4]), candidates=1)
    layer = draw.layer(config, dtype=dtype)
    assert layer.indexer is not None
    assert layer.indexer.head_weight is not None
    with torch.no_grad():
        for weight in (layer.indexer.query.weight, layer.indexer.key.weight):
            weight.copy_(draw.integers(-1, 1, *weight.shape))
        for zero in layer.indexer.head_weight.parameters():
            zero.zero_()
    return layer


def test_top_k_keeps_the_best_and_of_equals_the_earlier(draw: Draw) -> None:
    for _ in range(20):
        batch, queries, keys = draw.random.randint(1, 3), draw.random.randint(0, 5), draw.random.randint(1, 12)
        scores = draw.integers(-2, 2, batch, queries, keys).float() / 4
        candidates = draw.integers(0, 2, batch, queries, keys) > 0
        forced = (draw.integers(0, 3, batch, queries, keys) == 0) & candidates
        free = (candidates & ~forced).sum(-1)
        k = forced.sum(-1) + (torch.rand(free.shape, generator=draw.generator) * (free + 1)).long()
        kept = top_k(scores, candidates, forced, k)
        for b in range(batch):
            for t in range(queries):
                row = [s for s in range(keys) if candidates[b, t, s]]
                row.sort(key=lambda s: (not forced[b, t, s], -scores[b, t, s], s))
                assert kept[b, t].nonzero().flatten().tolist() == sorted(row[: k[b, t]])


EXACT = ("fixed", "ratio", "threshold")  # in fp32 too; the others round k_t itself


@pytest.mark.parametrize(
    ("controller", "dtype"), [(c, torch.float64) for c in CONTROLLERS] + [(c, torch.float32) for c in EXACT]
)
def test_selection_is_the_oracles_on_exact_scores_ties_included(
    draw: Draw, controller: str, dtype: torch.dtype
) -> None:
    ties = 0
    for _ in range(4):
        layer = exact_layer(draw, controller, dtype)
        hidden = draw.integers(-1, 1, 2, 18, layer.config.hidden_size).to(dtype)
        starts = draw.random.choice([None, draw.starts(2, 18)])
        oracle = oracle_attention(layer, hidden, starts)
        assert torch.equal(select(layer, hidden, starts), oracle.selection)
        ties += sum(len(row) - len(row.unique()) for row in oracle.scores[~oracle.scores.isinf().all(-1)])
    assert ties > 0


@pytest.mark.parametrize("indexer", INDEXERS)
def test_no_key_left_out_scores_higher_than_one_kept(draw: Draw, indexer: str) -> None:
    """The certificate: min(selected) ≥ max(unselected) − 2ε, scores by the oracle, ε the error of the layer's."""
    for controller in CONTROLLERS:
        config = draw.config(controller, indexer, coarse=None, share=1, local_window=0, sink_tokens=0)
        layer = draw.layer(config, dtype=torch.float32)
        hidden, starts = draw.hidden(layer, 2, 20), draw.starts(2, 20)
        exact, kept = oracle_attention(layer, hidden, starts).scores, select(layer, hidden, starts)
        visible = ~exact.isinf()
        assert layer.indexer is not None
        scores = layer.indexer.scores(*layer.indexer(hidden, torch.arange(20) - starts))
        epsilon = float((scores.detach() - exact)[visible].abs().max())
        assert epsilon < 1e-5
        worst_kept = exact.masked_fill(~kept, torch.inf).amin(-1)
        best_left = exact.masked_fill(kept, -torch.inf).amax(-1)
        assert (worst_kept >= best_left - 2 * epsilon).all()


def test_equal_scores_keep_the_earliest_keys(draw: Draw) -> None:
    layer = draw.layer(draw.config("fixed", share=1, local_window=0, sink_tokens=0, coarse=None))
    assert layer.indexer is not None
    torch.nn.init.zeros_(layer.indexer.query.weight)
    k, keys = layer.config.controller.k, torch.arange(16)
    selection = select(layer, draw.hidden(layer, 2, 16))
    assert torch.equal(selection, ((keys < k) & (keys <= keys[:, None])).expand_as(selection))


def test_a_query_keeps_exactly_k_keys_or_all_it_sees(draw: Draw) -> None:
    layer = draw.layer(draw.config("fixed", share=1, local_window=0, sink_tokens=0, coarse=None))
    starts = draw.starts(3, 20)
    kept = select(layer, draw.hidden(layer, 3, 20), starts).sum(-1)
    assert torch.equal(kept, (torch.arange(20) - starts + 1).clamp_max(layer.config.controller.k))


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_local_and_sink_tokens_are_always_kept_and_within_k(draw: Draw, controller: str) -> None:
    layer = draw.layer(draw.config(controller, share=1, local_window=3, sink_tokens=2))
    hidden, starts = draw.hidden(layer, 2, 20), draw.starts(2, 20)
    selection, keys = select(layer, hidden, starts), torch.arange(20)
    local, sink = keys > keys[:, None] - 3, keys < starts[..., None] + 2
    visible = (keys <= keys[:, None]) & (keys >= starts[..., None])
    forced = (local | sink) & visible
    assert (selection | ~forced).all()
    assert (selection.sum(-1) <= forced.sum(-1).clamp_min(layer.config.controller.k_max)).all()


def test_every_query_keeps_only_keys_of_its_document_up_to_itself_and_at_least_one(draw: Draw) -> None:
    for _ in range(10):
        layer = draw.layer(draw.config())
        starts, keys = draw.starts(2, 15), torch.arange(15)
        selection = select(layer, draw.hidden(layer, 2, 15), starts)
        assert not (selection & ((keys > keys[:, None]) | (keys < starts[..., None]))).any()
        assert selection.any(-1).all()


@pytest.mark.parametrize("share", [2, 4, 8])
def test_a_window_uses_its_first_querys_selection_and_its_own_tokens(draw: Draw, share: int) -> None:
    layer = draw.layer(draw.config(share=1))
    hidden, starts = draw.hidden(layer, 2, 21), draw.starts(2, 21)
    own = select(layer, hidden, starts)
    layer.config.selection.share = share
    shared = select(layer, hidden, starts)
    for b in range(2):
        for t in range(21):
            leader = t - (t - int(starts[b, t])) % share
            expected = own[b, leader].clone()
            expected[leader : t + 1] = True
            assert torch.equal(shared[b, t], expected)


def test_blocks_worth_the_whole_context_change_nothing(draw: Draw) -> None:
    for controller in CONTROLLERS:
        layer = draw.layer(draw.config(controller, coarse=None))
        hidden, starts = draw.hidden(layer, 2, 17), draw.starts(2, 17)
        exact = select(layer, hidden, starts)
        layer.config.selection.coarse = CoarseConfig(block=draw.random.randint(1, 5), candidates=100)
        assert torch.equal(select(layer, hidden, starts), exact)


def test_two_levels_choose_among_few_keys(draw: Draw) -> None:
    config = draw.config("fixed", coarse=CoarseConfig(block=2, candidates=1), local_window=0, sink_tokens=0)
    config.controller = ControllerConfig(kind="fixed", k=4, k_min=1, k_max=8)
    layer = draw.layer(config)
    scored = ~oracle_attention(layer, draw.hidden(layer, 1, 24)).scores.isinf()
    assert int(scored.sum(-1).max()) <= 4 + 2 * 2


def test_forced_keys_are_visible_ones(draw: Draw) -> None:
    config = draw.config(local_window=100, sink_tokens=100).selection
    starts = draw.starts(2, 9)
    queries = Queries(torch.arange(9), starts)
    assert torch.equal(queries.forced(config, 9), queries.visible(9))


def test_a_layer_below_itself_is_no_place_to_reuse(draw: Draw) -> None:
    layer = draw.layer(draw.config(reuse=1), number=1)
    with pytest.raises(ValueError, match="reuses a selection 1 below"):
        layer(draw.hidden(layer, 1, 3))
