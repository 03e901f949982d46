"""The arms of one module, and the inputs at its limits."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from gsa.attention.attention import GatedSparseAttention
from gsa.attention.cache import LayerCache
from gsa.attention.config import AttentionConfig
from gsa.attention.controller import ControllerConfig
from gsa.attention.gates import GateConfig
from gsa.attention.rope import rope
from gsa.errors import ConfigError
from gsa.settings import check
from tests.draw import CONTROLLERS, INDEXERS, Draw


def plain_attention(layer: GatedSparseAttention, hidden: Tensor) -> Tensor:
    """Dense causal attention of grouped heads without gates, as one would write it without this project."""
    config, place = layer.config, torch.arange(hidden.shape[1])[None]
    q, k, v = (
        project(hidden).unflatten(-1, (-1, config.head_dim)) for project in (layer.query, layer.key, layer.value)
    )
    q, k = rope(q, place, config.rope_theta), rope(k, place, config.rope_theta)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    output: Tensor = layer.out(attended.transpose(1, 2).flatten(2))
    return output


def test_dense_arm_is_plain_attention(draw: Draw) -> None:
    config = draw.config()
    config.sparse, config.gates.places = False, []
    layer = draw.layer(config)
    hidden = draw.hidden(layer, 2, 13)
    assert_close(layer(hidden), plain_attention(layer, hidden))


def test_dense_stage_of_a_sparse_layer_is_plain_attention(draw: Draw) -> None:
    config = draw.config()
    config.gates.places = []
    layer = draw.layer(config)
    hidden = draw.hidden(layer, 2, 13)
    for stage in ("dense", "warmup"):
        assert_close(layer.attend(hidden, stage=stage).output, plain_attention(layer, hidden))


@pytest.mark.parametrize("indexer", INDEXERS)
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_k_of_all_tokens_without_gates_is_dense_attention(draw: Draw, controller: str, indexer: str) -> None:
    config = draw.config(controller, indexer)
    config.gates.places = []
    config.controller.k_min = config.controller.k = config.controller.k_max = 100
    config.controller.ratio = 1.0  # two levels count their blocks by it
    layer = draw.layer(config)
    hidden = draw.hidden(layer, 2, 13)
    assert_close(layer(hidden), plain_attention(layer, hidden))


def test_the_four_arms_are_settings_of_one_module(draw: Draw) -> None:
    arms = {}
    for name, sparse, places, kind in (
        ("dense", False, [], "relu"),
        ("gated-only", False, ["G1", "G2"], "relu"),
        ("sparse-only", True, [], "relu"),
        ("gated sparse", True, ["G1", "G2"], "gated_sigmoid"),
    ):
        config = draw.config(indexer=kind, reuse=0)
        config.sparse, config.gates.places = sparse, places
        config.controller.kind = "fixed"
        layer = draw.layer(config)
        arms[name] = {parameter.split(".")[0] for parameter, _ in layer.named_parameters()}
        assert layer(draw.hidden(layer, 2, 9)).isfinite().all()
    projections = {"query", "key", "value", "out"}
    assert arms["dense"] == projections
    assert arms["gated-only"] == projections | {"gates"}
    assert arms["sparse-only"] == projections | {"indexer"}
    assert arms["gated sparse"] == projections | {"gates", "indexer"}


def test_the_default_is_elementwise_sigmoid_gates_at_g1_and_g2() -> None:
    layer = GatedSparseAttention(AttentionConfig())
    assert set(layer.gates) == {"G1", "G2"}
    for name, size in (("G1", 4 * 64), ("G2", 4 * 64)):
        weight, bias = (layer.get_parameter(f"gates.{name}.projection.{part}") for part in ("weight", "bias"))
        assert weight.shape == (size, 256)
        assert (bias == 0.5).all()
        assert 0 < float(weight.detach().abs().max()) <= 0.1 * math.sqrt(6 / (size + 256))


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("shape", [(2, 0), (0, 5), (2, 1), (1, 2)])
def test_no_token_one_token_and_fewer_than_k_min_work(draw: Draw, shape: tuple[int, int], controller: str) -> None:
    for stage in ("dense", "warmup", "sparse"):
        config = draw.config(controller)
        config.controller.k_min, config.controller.k, config.controller.k_max = 5, 6, 7
        layer = draw.layer(config)
        hidden = draw.hidden(layer, *shape).requires_grad_()
        result = layer.attend(hidden, stage=stage, keep_selection=True, indexer_loss=True, measure=True)
        assert result.output.shape == hidden.shape
        loss = result.output.sum() + (0 if result.indexer_loss is None else result.indexer_loss)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in [hidden, *layer.parameters()])
        if hidden.numel():
            assert all(value.isfinite() for value in result.statistics.values())
            assert result.selection is None or result.selection.any(-1).all()


def test_a_call_without_tokens_leaves_a_cache_as_it_was(draw: Draw) -> None:
    layer, cache = draw.layer(draw.config(share=4)), LayerCache()
    hidden = draw.hidden(layer, 2, 7)
    layer.attend(hidden[:, :0], cache=cache)
    first = layer.attend(hidden[:, :6], cache=cache).output
    layer.attend(hidden[:, :0], cache=cache)
    last = layer.attend(hidden[:, 6:], cache=cache).output
    assert_close(torch.cat((first, last), dim=1), layer(hidden))


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("value", [0.0, 1.0, 10.0])
def test_equal_tokens_give_equal_scores_and_no_nan(draw: Draw, controller: str, value: float) -> None:
    for indexer in INDEXERS:
        config = draw.config(controller, indexer)
        config.indexer.rope = False
        layer = draw.layer(config, dtype=torch.float32)
        hidden = torch.full((2, 12, config.hidden_size), value, requires_grad=True)
        result = layer.attend(hidden, indexer_loss=True, measure=True)
        assert result.indexer_loss is not None
        (result.output.sum() + result.indexer_loss).backward()
        assert result.output.isfinite().all()
        assert result.indexer_loss.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in [hidden, *layer.parameters()])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_heads": 4, "num_kv_heads": 3}, "attention.num_kv_heads"),
        ({"head_dim": 5}, "attention.head_dim"),
        ({"head_dim": 0}, "attention.head_dim"),
        ({"hidden_size": 254, "gates": GateConfig(places=["G5"], granularity="head")}, "attention.hidden_size"),
        ({"gates": GateConfig(places=["G6"])}, "attention.gates.places"),
        ({"gates": GateConfig(activation="tanh")}, "attention.gates.activation"),
        ({"controller": ControllerConfig(k_min=9, k=9, k_max=8)}, "attention.controller.k_min"),
        ({"controller": ControllerConfig(kind="fixed", k=1)}, "attention.controller.k"),
        ({"controller": ControllerConfig(kind="top")}, "attention.controller.kind"),
        ({"controller": ControllerConfig(ratio=math.nan)}, "attention.controller.ratio"),
        ({"query_chunk": 0}, "attention.query_chunk"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(AttentionConfig(**changes), "attention")
    assert refused.value.key == key


@pytest.mark.parametrize("share", [0, 3, 6, -2])
def test_a_window_that_is_no_power_of_two_is_refused(share: int) -> None:
    config = AttentionConfig()
    config.selection.share = share
    with pytest.raises(ConfigError, match=r"attention\.selection\.share"):
        check(config, "attention")


def test_reuse_below_the_first_layer_is_refused() -> None:
    config = AttentionConfig()
    config.selection.reuse = 2
    with pytest.raises(ConfigError, match=r"selection\.reuse = 2"):
        GatedSparseAttention(config, layer=1)
