"""The layer computes what the oracle computes: outputs, selections, losses and gradients."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gsa.attention.attention import AttentionResult, GatedSparseAttention
from gsa.attention.config import Stage
from gsa.attention.oracle import OracleResult, oracle_attention
from tests.draw import CONTROLLERS, INDEXERS, Draw

STAGES: tuple[Stage, ...] = ("dense", "warmup", "sparse")


def both(
    layer: GatedSparseAttention, hidden: Tensor, starts: Tensor | None, stage: Stage, lower: Tensor | None = None
) -> tuple[AttentionResult, OracleResult]:
    result = layer.attend(hidden, starts, stage=stage, lower=lower, keep_selection=True, indexer_loss=True)
    return result, oracle_attention(layer, hidden, starts, stage, lower)


def assert_same(result: AttentionResult, oracle: OracleResult) -> None:
    if result.selection is not None:
        assert torch.equal(result.selection, oracle.selection)
    assert_close(result.output, oracle.output)
    assert (result.indexer_loss is None) == (oracle.indexer_loss is None)
    if result.indexer_loss is not None and oracle.indexer_loss is not None:
        assert_close(result.indexer_loss, oracle.indexer_loss)


@pytest.mark.parametrize("indexer", INDEXERS)
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_layer_equals_the_oracle(draw: Draw, controller: str, indexer: str) -> None:
    for stage in ("sparse", "sparse", "sparse", "warmup", "dense"):
        layer = draw.layer(draw.config(controller, indexer))
        hidden = draw.hidden(layer, 2, draw.random.randint(1, 14))
        starts = draw.random.choice([None, draw.starts(2, hidden.shape[1])])
        assert_same(*both(layer, hidden, starts, stage))


@pytest.mark.parametrize("stage", STAGES)
def test_layer_that_reuses_a_selection_equals_the_oracle(draw: Draw, stage: Stage) -> None:
    for share in (1, 2, 4):
        layer = draw.layer(draw.config(reuse=1, share=share), number=1)
        hidden, starts = draw.hidden(layer, 2, 11), draw.starts(2, 11)
        assert_same(*both(layer, hidden, starts, stage, draw.lower(starts)))


def test_dense_layer_equals_the_oracle(draw: Draw) -> None:
    for _ in range(4):
        config = draw.config()
        config.sparse = False
        layer = draw.layer(config)
        result, oracle = both(layer, draw.hidden(layer, 2, 9), draw.starts(2, 9), "sparse")
        assert_same(result, oracle)
        assert result.selection is None
        assert result.indexer_loss is None


def test_number_of_keys_kept_equals_the_oracles(draw: Draw) -> None:
    for controller in CONTROLLERS:
        layer = draw.layer(draw.config(controller, share=1))
        result, oracle = both(layer, draw.hidden(layer, 2, 16), draw.starts(2, 16), "sparse")
        assert result.selection is not None
        assert torch.equal(result.selection.sum(-1), oracle.k)


def test_indexer_scores_equal_the_oracles(draw: Draw) -> None:
    for kind in INDEXERS:
        layer = draw.layer(draw.config(indexer=kind, coarse=None))
        hidden, starts = draw.hidden(layer, 2, 10), draw.starts(2, 10)
        assert layer.indexer is not None
        scores = layer.indexer.scores(*layer.indexer(hidden, torch.arange(10) - starts))
        expected = oracle_attention(layer, hidden, starts).scores
        assert_close(torch.where(expected.isinf(), expected, scores), expected)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_equal_the_oracles(draw: Draw, stage: Stage) -> None:
    for controller in ("learned", draw.random.choice(CONTROLLERS)):
        layer = draw.layer(draw.config(controller))
        hidden, starts = draw.hidden(layer, 2, 7).requires_grad_(), draw.starts(2, 7)
        inputs = [hidden, *layer.parameters()]
        weight = draw.normal(*hidden.shape)
        gradients = []
        for result in both(layer, hidden, starts, stage):
            loss = (result.output * weight).sum()
            if result.indexer_loss is not None:
                loss = loss + result.indexer_loss
            gradients.append(torch.autograd.grad(loss, inputs, materialize_grads=True))
        for got, expected in zip(*gradients, strict=True):
            assert_close(got, expected)
