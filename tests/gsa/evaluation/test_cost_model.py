"""The modelled cost orders configurations as measured times do, and counts what the model itself selects."""

import itertools
from typing import Any, NamedTuple

import pytest
import torch

from gsa.attention.chunked import attend_chunked
from gsa.attention.config import AttentionConfig
from gsa.attention.controller import ControllerConfig
from gsa.attention.indexer import IndexerConfig
from gsa.attention.selection import CoarseConfig, SelectionConfig
from gsa.errors import RequestError
from gsa.evaluation.cost_model import layer_cost, modelled_cost
from gsa.evaluation.selections import TILES, Selected, observe
from gsa.evaluation.speed import core_inputs
from gsa.model import GSAForCausalLM, LayerConfig, ModelConfig
from kernels.results import forwards
from tests.draw import Draw

LONG = 131072


class Measured(NamedTuple):
    """A forward of kernels/results.json."""

    length: int
    heads: str
    config: AttentionConfig
    u32: float
    ours: float  # milliseconds of the kernels
    dense: float


def measured() -> list[Measured]:
    found = []
    for row in forwards():
        coarse = CoarseConfig(row["block"], row["candidates"]) if "block" in row else None
        indexer = IndexerConfig(num_heads=row["indexer_heads"], head_dim=row["indexer_head_dim"])
        config = realistic(2048, row["heads"], row["kv_heads"], indexer, row.get("share", 1), coarse)
        heads = f"{row['heads']}/{row['kv_heads']}"
        ours = row.get("kernels_ms", row["together_ms"])  # without the host where that is given
        found.append(Measured(row["length"], heads, config, row["u32"], ours, row["cudnn_ms"]))
    return found


def realistic(
    k: int,
    heads: int = 32,
    kv_heads: int = 8,
    indexer: IndexerConfig | None = None,
    share: int = 1,
    coarse: CoarseConfig | None = None,
) -> AttentionConfig:
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        indexer=indexer or IndexerConfig(num_heads=1, head_dim=128),
        controller=ControllerConfig(kind="fixed", k=k, k_max=max(k, 4096)),
        selection=SelectionConfig(share=share, coarse=coarse),
    )


def selected(config: AttentionConfig, length: int, u32: float) -> Selected:
    """Selections whose unions are u32·k long for 32 queries, and grow to that evenly."""
    share, k = config.selection.share, min(config.controller.k, length)
    own = k - k**2 / 2 / length  # early queries see fewer than k keys
    forced = (share - 1) / 2
    overlap = tuple(1 + (u32 - 1) * (tile - 1) / 31 if share == 1 else 1.0 for tile in TILES)
    return Selected(own, forced, overlap, tuple(forced + (tile - 1) / 2 * (share > 1) for tile in TILES))


def modelled(config: AttentionConfig, length: int, u32: float) -> float:
    return layer_cost(config, length, selected(config, length, u32)).milliseconds


def test_long_contexts_cost_what_they_were_measured_at() -> None:
    rows = [row for row in measured() if row.length >= 65536]
    assert len(rows) == 13
    for row in rows:
        assert modelled(row.config, row.length, row.u32) == pytest.approx(row.ours, rel=0.3), row
        assert layer_cost(row.config, row.length, None).milliseconds == pytest.approx(row.dense, rel=0.1), row


def test_two_levels_cost_what_one_does_where_all_keys_are_candidates() -> None:
    one, two = realistic(2048), realistic(2048, coarse=CoarseConfig(block=32, candidates=8))
    costs = [modelled(two, length, 2.5) == modelled(one, length, 2.5) for length in (4096, 8 * 2048, 8 * 2048 + 1)]
    assert costs == [True, True, False]


def test_what_was_measured_to_be_faster_is_modelled_to_be_faster() -> None:
    def apart(one: float, other: float) -> bool:
        """Whether another run might not have them the other way round."""
        return not 0.9 < one / other < 1.1

    compared = 0
    for one, other in itertools.combinations(measured(), 2):
        if (one.length, one.heads) == (other.length, other.heads) and apart(one.ours, other.ours):
            both = (modelled(x.config, x.length, x.u32) for x in (one, other))
            assert (one.ours < other.ours) == (next(both) < next(both)), (one, other)
            compared += 1
    assert compared == 27
    for row in measured():
        sparse, dense = modelled(row.config, row.length, row.u32), layer_cost(row.config, row.length, None).milliseconds
        assert (row.ours < row.dense) == (sparse < dense) or not apart(row.ours, row.dense), row


def test_more_keys_cost_more_and_dense_attention_costs_most_at_long_lengths(draw: Draw) -> None:
    pick = draw.random.choice
    for _ in range(50):
        indexer = IndexerConfig(num_heads=pick([1, 2, 4]), head_dim=pick([32, 64]))
        options = (32, pick([1, 2, 4, 8]), indexer, pick([1, 1, 2, 32]))
        u32, keys = draw.random.uniform(1, 4), sorted(draw.random.sample(range(64, 4097), 5))
        costs = [layer_cost(realistic(k, *options), LONG, selected(realistic(k, *options), LONG, u32)) for k in keys]
        for fewer, more in itertools.pairwise(costs):
            assert fewer.milliseconds < more.milliseconds
            assert fewer.work.bytes < more.work.bytes
            assert fewer.work.operations < more.work.operations
            assert fewer.workspace <= more.workspace
        assert costs[-1].milliseconds < layer_cost(realistic(64, *options), LONG, None).milliseconds


def test_tiles_are_those_of_the_kernels() -> None:
    for share, kv_heads, tile in ((1, 8, 32), (32, 8, 32), (1, 4, 16), (1, 1, 4), (1, 32, 32)):
        config = realistic(512, kv_heads=kv_heads, share=share)
        assert layer_cost(config, LONG, selected(config, LONG, 2)).tile == tile


def test_a_longer_union_costs_more_and_windows_cost_less_than_either(draw: Draw) -> None:
    for _ in range(20):
        k, length = draw.random.randrange(256, 4096), draw.random.choice([32768, 65536, LONG])
        windows = modelled(realistic(k, share=32), length, 1)
        assert windows < modelled(realistic(k), length, 2.5) < modelled(realistic(k), length, 4)


@pytest.mark.parametrize("controller", ["fixed", "ratio", "threshold", "variance", "entropy", "learned"])
def test_at_the_length_of_the_text_the_selections_are_the_models_own(draw: Draw, controller: str) -> None:
    coarse = draw.random.choice([None, CoarseConfig(block=2, candidates=2)])
    model = draw.model(controller=controller, coarse=coarse).eval()
    length = draw.random.randrange(8, 40)
    tokens = draw.integers(0, 10, 2, length)
    for found, given in zip(observe(model, tokens, length), core_inputs(model, tokens), strict=True):
        config = given[0].config
        assert (found is None) == (not config.sparse)
        if found is None:
            continue
        mask = attend_chunked(*given[:2], given[2]._replace(keep_selection=True)).selection
        assert mask is not None
        windowed = config.selection.share > 1  # whether a leader selects itself is not counted
        assert found.keys == pytest.approx(float(mask.sum(2).double().mean()), abs=1 if windowed else 1e-9)
        if not windowed:
            place = torch.arange(length)
            near = (place > place[:, None] - config.selection.local_window) | (place < config.selection.sink_tokens)
            chosen = mask & ~near
            for tile, overlap in zip(TILES[:4], found.overlap, strict=False):
                tiles = chosen[:, : length // tile * tile].unflatten(1, (-1, tile))
                assert overlap == pytest.approx(float(tiles.any(2).sum()) * tile / max(int(tiles.sum()), 1) or 1)


def test_keys_at_a_longer_length_follow_the_controllers_rule(draw: Draw) -> None:
    tokens, scale = draw.integers(0, 10, 1, 32), draw.random.choice([2, 5, 16])
    length = 32 * scale
    plain: dict[str, Any] = {"local_window": 0, "sink_tokens": 0, "coarse": None}
    places = torch.arange(1, 33).double() * scale
    fixed = draw.model(controller="fixed", **plain).eval()
    found = observe(fixed, tokens, length)[0]
    assert found is not None
    assert found.keys == pytest.approx(float(places.clamp_max(fixed.config.attention.controller.k).mean()))

    ratio = draw.model(controller="ratio", **plain)
    settings = ratio.config.attention.controller
    found = observe(ratio.eval(), tokens, length)[0]
    wanted = (places * settings.ratio).ceil().clamp(settings.k_min, settings.k_max).minimum(places)
    assert found is not None
    assert found.keys == pytest.approx(float(wanted.mean()))
    for tile, overlap in zip(TILES, found.overlap, strict=True):
        assert 1 <= overlap <= tile
    assert list(found.overlap) == sorted(found.overlap)


def test_the_cost_of_a_model_is_that_of_its_layers_and_always_the_same(draw: Draw) -> None:
    model, tokens = draw.model().eval(), draw.integers(0, 10, 2, 21)
    cost = modelled_cost(model, tokens, 1000)
    assert cost == modelled_cost(model, tokens, 1000)
    assert len(cost.layers) == 4
    assert cost.milliseconds == pytest.approx(sum(layer.milliseconds for layer in cost.layers))
    assert cost.work.operations == pytest.approx(sum(layer.work.operations for layer in cost.layers))
    assert cost.workspace == max(layer.workspace for layer in cost.layers)
    assert [layer.sparse for layer in cost.layers] == [model.config.attention_of(i).sparse for i in range(4)]
    assert cost.milliseconds < modelled_cost(model, tokens, 2000).milliseconds


def test_a_layer_that_keeps_every_key_costs_what_dense_attention_costs(draw: Draw) -> None:
    attention = realistic(64, heads=2, kv_heads=1)
    config = ModelConfig(2, 8, vocab_size=11, attention=attention, layers=[LayerConfig(sparse=False)])
    model = GSAForCausalLM(config)
    dense, sparse = modelled_cost(model, draw.integers(0, 10, 1, 16), 64).layers
    assert dense == sparse
    assert dense.work.operations == 4 * 128 * 2 * 64 * 65 / 2


def test_no_text_and_no_length_are_refused(draw: Draw) -> None:
    model = draw.model()
    for tokens, length in ((draw.integers(0, 10, 1, 0), 10), (draw.integers(0, 10, 1, 5), 0)):
        with pytest.raises(RequestError, match="must be at least 1"):
            modelled_cost(model, tokens, length)
