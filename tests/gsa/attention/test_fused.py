"""The layer on its kernels, in Triton's interpreter and fp32, computes what the oracle computes."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gsa.attention.attention import AttentionResult, GatedSparseAttention
from gsa.attention.cache import Cache
from gsa.attention.config import AttentionConfig, Stage
from gsa.attention.oracle import oracle_attention
from gsa.attention.selection import CoarseConfig
from gsa.errors import RequestError
from kernels.words import pack, unpack
from tests.draw import CONTROLLERS, INDEXERS, Draw

pytestmark = pytest.mark.slow  # kernels are interpreted

ROUNDING = 1e-5  # of an fp32 score


def fused_config(draw: Draw, controller: str, indexer: str, **selection: object) -> AttentionConfig:
    config = draw.config(controller, indexer, **selection)
    config.backend, config.head_dim = "triton", 16
    return config


def selected(result: AttentionResult, length: int) -> Tensor:
    assert result.selection is not None
    return unpack(result.selection, length)


def make_exact(draw: Draw, layer: GatedSparseAttention) -> None:
    """Give the indexer weights with which hidden states of -1, 0 and 1 have exact scores, so that equal ones tie.

    Products of queries and keys are multiples of 1/2. Heads differ in their biases, and have one weight for all
    queries: sums over heads are equal where each head's product is, and only there.
    """
    assert layer.indexer is not None
    with torch.no_grad():
        for projection in (layer.indexer.query, layer.indexer.key):
            inputs = draw.integers(0, projection.in_features - 1, projection.out_features)
            signs = 2 * draw.integers(0, 1, projection.out_features) - 1
            projection.weight.zero_()
            projection.weight[torch.arange(projection.out_features), inputs] = signs.to(projection.weight)
        if layer.indexer.head_weight is not None:
            layer.indexer.head_weight.weight.zero_()


@pytest.mark.parametrize("indexer", INDEXERS)
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_layer_equals_the_oracle(draw: Draw, controller: str, indexer: str) -> None:
    """On exact scores: selections, ties among them, are the same, and so are outputs and losses but for rounding."""
    stages: tuple[Stage, ...] = ("sparse", draw.random.choice(["sparse", "warmup", "dense"]))
    for stage in stages:
        coarse = draw.random.choice([None, CoarseConfig(block=draw.random.choice([1, 2, 4]), candidates=1)])
        config = fused_config(draw, controller, indexer, coarse=coarse)
        config.indexer.rope, config.indexer.head_dim = False, 4
        layer = draw.layer(config, dtype=torch.float32)
        make_exact(draw, layer)
        length = draw.random.choice([1, 7, 33, 40])
        hidden = draw.integers(-1, 1, 2, length, config.hidden_size).float()
        starts = draw.random.choice([None, draw.starts(2, length)])
        result = layer.attend(hidden, starts, stage=stage, keep_selection=True, indexer_loss=True)
        oracle = oracle_attention(layer, hidden, starts, stage)
        if stage == "sparse":
            assert torch.equal(selected(result, length), oracle.selection)
        assert_close(result.output, oracle.output.float(), atol=2e-5, rtol=1e-4)
        assert (result.indexer_loss is None) == (oracle.indexer_loss is None) == (stage == "dense")
        if result.indexer_loss is not None and oracle.indexer_loss is not None:
            assert_close(result.indexer_loss, oracle.indexer_loss.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("indexer", INDEXERS)
def test_of_any_scores_the_highest_are_selected(draw: Draw, indexer: str) -> None:
    config = fused_config(draw, "fixed", indexer, share=1, coarse=None)
    layer = draw.layer(config, dtype=torch.float32)
    hidden, starts = draw.hidden(layer, 2, 24), draw.starts(2, 24)
    mine = selected(layer.attend(hidden, starts, keep_selection=True), 24)
    oracle = oracle_attention(layer, hidden, starts)
    assert torch.equal(mine.sum(-1), oracle.k)
    place = torch.arange(24)
    forced = (place > place[:, None] - config.selection.local_window) | (
        place < starts[..., None] + config.selection.sink_tokens
    )
    worst = oracle.scores.masked_fill(~mine | forced, torch.inf).amin(-1)
    best = oracle.scores.masked_fill(mine, -torch.inf).amax(-1)
    assert (worst >= best - 2 * ROUNDING).all()


@pytest.mark.parametrize("share", [1, 2, 32])
def test_layer_that_reuses_a_selection_equals_the_oracle(draw: Draw, share: int) -> None:
    config = fused_config(draw, "fixed", "relu", reuse=1, share=share)
    layer = draw.layer(config, number=1, dtype=torch.float32)
    hidden, starts = draw.hidden(layer, 2, 35), draw.starts(2, 35)
    lower = draw.lower(starts)
    oracle = oracle_attention(layer, hidden, starts, lower=lower)
    for given in (lower, pack(lower)):
        result = layer.attend(hidden, starts, lower=given, keep_selection=True)
        assert torch.equal(selected(result, 35), oracle.selection)
        assert_close(result.output, oracle.output.float(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("stage", ["dense", "warmup", "sparse"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_equal_those_of_the_torch_backend(draw: Draw, stage: Stage, deterministic: bool) -> None:
    config = fused_config(draw, draw.random.choice(CONTROLLERS), draw.random.choice(INDEXERS))
    layer = draw.layer(config, dtype=torch.float32)
    hidden, starts = draw.hidden(layer, 2, 37), draw.starts(2, 37)
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = {backend: gradients(layer, backend, hidden, starts, stage) for backend in ("torch", "triton")}
    finally:
        torch.use_deterministic_algorithms(False)
    largest = torch.stack([g.abs().max() for g in found["torch"].values() if g is not None]).max()
    for name, expected in found["torch"].items():
        assert (expected is None) == (found["triton"][name] is None), name
        if expected is not None:
            scale = torch.maximum(
                expected.abs().max(), largest / 100
            )  # one key for each query: no gradient but rounding
            own = found["triton"][name]
            assert own is not None
            assert_close(own / scale, expected / scale, atol=2e-4, rtol=1e-3, msg=name)


def gradients(
    layer: GatedSparseAttention, backend: str, hidden: Tensor, starts: Tensor, stage: Stage
) -> dict[str, Tensor | None]:
    layer.config.backend = backend
    hidden = hidden.clone().requires_grad_()
    result = layer.attend(hidden, starts, stage=stage, indexer_loss=True)
    loss = (result.output * torch.linspace(-1, 1, result.output.shape[-1])).sum()
    if result.indexer_loss is not None:
        loss = loss + result.indexer_loss
    names = ["hidden", *(name for name, _ in layer.named_parameters())]
    inputs = [hidden, *layer.parameters()]
    return dict(zip(names, torch.autograd.grad(loss, inputs, allow_unused=True), strict=True))


def test_decoding_in_pieces_equals_one_forward(draw: Draw) -> None:
    for controller in ("fixed", "variance"):
        config = fused_config(draw, controller, draw.random.choice(INDEXERS))
        layer = draw.layer(config, dtype=torch.float32).eval()
        hidden, starts = draw.hidden(layer, 2, 38), draw.starts(2, 38)
        whole = layer.attend(hidden, starts)
        for capacity in (None, 45):
            cache, parts = Cache(1, capacity), []
            for rows in (slice(0, 20), slice(20, 21), slice(21, 37), slice(37, 38)):
                held = cache.extend_starts(starts[:, rows], 2, rows.stop - rows.start, hidden.device)
                parts.append(layer.attend(hidden[:, rows], held, cache=cache.layers[0]).output)
            assert_close(torch.cat(parts, 1), whole.output, atol=1e-5, rtol=1e-4)


def test_statistics_and_uncertainty_equal_those_of_the_torch_backend(draw: Draw) -> None:
    config = fused_config(draw, "variance", "gated_sigmoid")
    layer = draw.layer(config, dtype=torch.float32)
    hidden, starts = draw.hidden(layer, 2, 33), draw.starts(2, 33)
    found = []
    for backend in ("torch", "triton"):
        layer.config.backend = backend
        found.append(layer.attend(hidden, starts, measure=True))
    for name, expected in found[0].statistics.items():
        assert_close(found[1].statistics[name].float(), expected.float(), atol=1e-3, rtol=1e-3)
    assert found[0].uncertainty is not None
    assert found[1].uncertainty is not None
    assert_close(found[1].uncertainty.float(), found[0].uncertainty.float(), atol=1e-4, rtol=1e-4)


def test_what_the_kernels_cannot_do_is_refused_by_name(draw: Draw) -> None:
    cases = {
        "head_dim = 6": ("head_dim", 6),
        "9x16 heads are more than 8x128": ("indexer.num_heads", 9),
    }
    for expected, (key, value) in cases.items():
        config = fused_config(draw, "fixed", "relu")
        config.indexer.head_dim = 16
        if key == "head_dim":
            config.head_dim = value
        else:
            config.indexer.num_heads = value
        layer = draw.layer(config, dtype=torch.float32)
        with pytest.raises(RequestError, match=expected):
            layer(draw.hidden(layer, 1, 4))
    layer = draw.layer(fused_config(draw, "fixed", "relu"), dtype=torch.float64)
    with pytest.raises(RequestError, match=r"torch.float64: torch.bfloat16 or torch.float16"):
        layer(draw.hidden(layer, 1, 4))
