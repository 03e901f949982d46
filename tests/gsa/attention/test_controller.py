"""How many keys a query keeps, and the running mean against which its uncertainty is judged."""

import math

import pytest
import torch
from torch.testing import assert_close

from gsa.attention.attention import GatedSparseAttention
from gsa.attention.controller import ControllerConfig, Uncertainty
from gsa.attention.selection import CoarseConfig
from tests.draw import CONTROLLERS, Draw


def layer_of(draw: Draw, config: ControllerConfig, coarse: CoarseConfig | None = None) -> GatedSparseAttention:
    drawn = draw.config("fixed", share=1, local_window=0, sink_tokens=0, coarse=coarse)
    drawn.controller = config
    return draw.layer(drawn)


def kept(draw: Draw, layer: GatedSparseAttention, length: int) -> list[int]:
    selection = layer.attend(draw.hidden(layer, 1, length), keep_selection=True).selection
    assert selection is not None
    counts: list[int] = selection.sum(-1)[0].tolist()
    return counts


def reference_of(layer: GatedSparseAttention) -> torch.Tensor:
    assert isinstance(layer.controller, Uncertainty)
    return layer.controller.reference


@pytest.mark.parametrize("ratio", [0.1, 0.25, 1 / 3, 0.7, 1.0])
def test_ratio_keeps_its_share_of_the_visible_keys_rounded_up(draw: Draw, ratio: float) -> None:
    layer = layer_of(draw, ControllerConfig(kind="ratio", ratio=ratio, k_min=1, k_max=100))
    assert kept(draw, layer, 60) == [math.ceil(round(ratio * (t + 1), 6)) for t in range(60)]


def test_ratio_counts_every_visible_key_where_only_some_are_scored(draw: Draw) -> None:
    layer = layer_of(draw, ControllerConfig(kind="ratio", ratio=0.25, k_min=1, k_max=100), CoarseConfig(2, 1))
    assert kept(draw, layer, 40) == [math.ceil((t + 1) / 4) for t in range(40)]


@pytest.mark.parametrize("kind", CONTROLLERS)
def test_k_stays_within_its_bounds_and_what_is_visible(draw: Draw, kind: str) -> None:
    config = ControllerConfig(kind=kind, k=6, k_min=4, k_max=8, ratio=draw.random.uniform(0.01, 1))
    for t, k in enumerate(kept(draw, layer_of(draw, config), 30)):
        assert min(4, t + 1) <= k <= min(8, t + 1)


def test_no_threshold_keeps_everything_and_one_above_all_scores_keeps_the_least(draw: Draw) -> None:
    for threshold, expected in ((-1.0, 20), (1e3, 3)):
        layer = layer_of(draw, ControllerConfig(kind="threshold", threshold=threshold, k_min=3, k_max=100))
        assert kept(draw, layer, 20)[-1] == expected


@pytest.mark.parametrize("kind", ["variance", "entropy"])
def test_uncertainty_at_its_reference_keeps_k_and_extremes_keep_half_and_one_and_a_half(draw: Draw, kind: str) -> None:
    layer = layer_of(draw, ControllerConfig(kind=kind, k=10, k_min=1, k_max=100))
    hidden = draw.hidden(layer, 1, 30)
    last = layer.train().attend(hidden[:, :30]).uncertainty
    earlier = layer.attend(hidden[:, :29]).uncertainty
    assert last is not None
    assert earlier is not None
    own = last[0] - earlier[0]  # the statistic of the last query
    for factor, expected in ((1 + 1e-9, {10, 11}), (1e-9, {6}), (1e9, {15})):
        reference_of(layer).fill_(float(own) * factor)
        selection = layer.attend(hidden, keep_selection=True).selection
        assert selection is not None
        assert int(selection[0, -1].sum()) in expected


def test_learned_k_runs_from_k_min_to_k_max_on_a_logarithmic_scale(draw: Draw) -> None:
    layer = layer_of(draw, ControllerConfig(kind="learned", k_min=2, k_max=18))
    head = dict(layer.named_parameters())
    with torch.no_grad():
        head["controller.head.weight"].zero_()
        for bias, expected in ((-50.0, 2), (0.0, 6), (50.0, 18)):
            head["controller.head.bias"].fill_(bias)
            assert kept(draw, layer, 25)[-1] in (expected, expected + 1)  # rounded up


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", CONTROLLERS)
def test_forward_and_backward_change_no_buffer(draw: Draw, kind: str, training: bool) -> None:
    layer = draw.layer(draw.config(kind)).train(training)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    result = layer.attend(draw.hidden(layer, 2, 9), indexer_loss=True, measure=True)
    assert result.indexer_loss is not None
    (result.output.sum() + result.indexer_loss).backward()
    assert_close(dict(layer.named_buffers()), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["variance", "entropy"])
def test_reference_is_the_running_mean_of_the_uncertainty(draw: Draw, kind: str) -> None:
    layer = layer_of(draw, ControllerConfig(kind=kind, k=3, k_min=1, k_max=5, momentum=0.75))
    assert isinstance(layer.controller, Uncertainty)
    layer.controller.update_reference(torch.tensor(2.0))
    assert_close(reference_of(layer), torch.tensor(2.0).double())  # the first mean takes the initial value's place
    layer.controller.update_reference(torch.tensor(4.0))
    assert_close(reference_of(layer), torch.tensor(2.5).double())


def test_uncertainty_is_gathered_in_training_only_and_adds_up_over_calls(draw: Draw) -> None:
    layer = draw.layer(draw.config("variance", share=1))
    hidden = draw.hidden(layer, 4, 8)
    assert layer.eval().attend(hidden).uncertainty is None
    layer.train()
    whole, first, second = (layer.attend(h).uncertainty for h in (hidden, hidden[:1], hidden[1:]))
    assert whole is not None
    assert first is not None
    assert second is not None
    assert_close(first + second, whole)
    assert whole[1] == 4 * 8
