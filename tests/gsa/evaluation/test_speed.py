"""What is timed of a trained model is what its layers compute."""

import torch
from torch.testing import assert_close

from gsa.attention.attention import GatedSparseAttention
from gsa.attention.chunked import attend_chunked
from gsa.evaluation.speed import core_inputs
from tests.draw import Draw


def test_the_cores_of_all_layers_are_seen_as_they_ran(draw: Draw) -> None:
    model = draw.model().eval()
    tokens = draw.integers(0, 10, 2, 19)
    seen = core_inputs(model, tokens)
    layers = [module for module in model.modules() if isinstance(module, GatedSparseAttention)]
    assert len(seen) == len(layers)
    assert all(layer.watch is None for layer in layers)
    for layer, given in zip(layers, seen, strict=True):
        assert given[0].config is layer.config
        assert given[1].q.shape[:2] == (2, 19)
    hidden = model.blocks[0].attention_norm(model.embedding(tokens))  # type: ignore[operator]
    attended = attend_chunked(*seen[0]).attended
    again = core_inputs(model, tokens)[0]
    assert torch.equal(attended, attend_chunked(*again).attended)
    assert_close(seen[0][1].hidden, hidden)
