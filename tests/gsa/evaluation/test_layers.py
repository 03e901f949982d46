"""What is measured of layers is what the plainest computation of the same numbers gives."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gsa.attention.attention import GatedSparseAttention
from gsa.attention.core import Projected
from gsa.attention.oracle import oracle_attention
from gsa.data.packing import DataConfig, Prepared, Windows
from gsa.evaluation import layers
from gsa.evaluation.layers import SHARES, TILE, layer_diagnostics
from gsa.evaluation.loss import EvaluationConfig
from gsa.model import GSAForCausalLM
from tests.draw import Draw

LENGTH = 38


def text(draw: Draw, across: bool) -> Prepared:
    """Two windows of random tokens, 0 the start of a document."""
    tokens = draw.integers(1, 10, 2 * LENGTH + 1)
    # long documents that start at no multiple of 8: windows of queries go on from one chunk to the next
    tokens[[draw.random.randint(1, 7), LENGTH + draw.random.randint(1, 7), draw.random.randint(LENGTH, 2 * LENGTH)]] = 0
    config = DataConfig(context_length=LENGTH, attend_across_documents=across)
    windows = Windows(tokens.numpy().astype(np.uint16), 0, config)
    nothing: Any = None
    return Prepared(windows, windows, nothing, "", Path())


def inputs(model: GSAForCausalLM, data: Prepared) -> list[tuple[GatedSparseAttention, Projected]]:
    """Each layer, and what its core is given for both windows."""
    found: list[tuple[GatedSparseAttention, Projected]] = []
    batch = data.held_out.batch([0, 1])
    modules = [module for module in model.modules() if isinstance(module, GatedSparseAttention)]
    for module in modules:
        module.watch = lambda parts, tokens, asked, module=module: found.append((module, tokens))
    with torch.no_grad():
        model.run(batch.tokens, starts=batch.starts)
    for module in modules:
        module.watch = None
    return found


def dense_attention(layer: GatedSparseAttention, tokens: Projected) -> Tensor:
    """[B, T, T], mean over the heads."""
    group = layer.config.num_heads // layer.config.num_kv_heads
    dense = torch.zeros(2, LENGTH, LENGTH, dtype=torch.float64)
    for b in range(2):
        for t in range(LENGTH):
            start = int(tokens.own_starts[b, t])
            for h in range(layer.config.num_heads):
                logits = tokens.k[b, start : t + 1, h // group] @ tokens.q[b, t, h] / math.sqrt(layer.config.head_dim)
                dense[b, t, start : t + 1] += logits.softmax(0) / layer.config.num_heads
    return dense


def exact_selection(layer: GatedSparseAttention, tokens: Projected) -> tuple[Tensor, Tensor]:
    """The selection without shared windows, and the scores, by the oracle."""
    held = layer.config
    selection = dataclasses.replace(held.selection, share=1)
    layer.config = dataclasses.replace(held, selection=selection)
    result = every = oracle_attention(layer, tokens.hidden, tokens.own_starts)
    if selection.coarse is not None:
        layer.config = dataclasses.replace(layer.config, selection=dataclasses.replace(selection, coarse=None))
        every = oracle_attention(layer, tokens.hidden, tokens.own_starts)
    layer.config = held
    return result.selection, every.scores


def shared(selected: Tensor, starts: Tensor, share: int) -> Tensor:
    result = torch.zeros_like(selected)
    for b in range(2):
        for t in range(LENGTH):
            leader = t - (t - int(starts[b, t])) % share
            result[b, t] = selected[b, leader]
            result[b, t, leader : t + 1] = True
    return result


def k_99(layer: GatedSparseAttention, dense: Tensor, scores: Tensor, starts: Tensor) -> int:
    rows = []
    for b in range(2):
        for t in range(LENGTH):
            start, config = int(starts[b, t]), layer.config.selection
            forced = {s for s in range(start, t + 1) if s > t - config.local_window or s < start + config.sink_tokens}
            order = sorted(range(start, t + 1), key=lambda s: (s not in forced, -float(scores[b, t, s]), s))
            rows.append([float(dense[b, t, s]) for s in order])
    for k in range(1, LENGTH + 1):
        if sum(sum(row[:k]) for row in rows) >= 0.99 * len(rows):
            return k
    raise AssertionError


def u32(selected: Tensor) -> float:
    unions, lengths = 0.0, 0.0
    for b in range(2):
        for first in range(0, LENGTH, TILE):
            tile = [set(selected[b, t].nonzero().flatten().tolist()) for t in range(first, min(first + TILE, LENGTH))]
            unions += len(set.union(*tile))
            lengths += sum(map(len, tile)) / len(tile)
    return unions / lengths


@pytest.mark.parametrize(("cells", "across"), [(1, False), (layers.CELLS, True)])
@pytest.mark.slow
def test_diagnostics_are_those_of_a_plain_computation(
    draw: Draw, cells: int, across: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "CELLS", cells)
    model, data = draw.model(), text(draw, across)
    found = layer_diagnostics(model, data, EvaluationConfig(sequences=2, batch_size=draw.random.choice([1, 2])))
    seen = inputs(model, data)
    assert len(found) == len(seen) == 4
    exact: list[Tensor | None] = []
    for i, (row, (layer, tokens)) in enumerate(zip(found, seen, strict=True)):
        dense, starts = dense_attention(layer, tokens), tokens.own_starts
        if not layer.config.sparse:
            exact.append(None)
            assert row["mass_kept"] == pytest.approx(1)
            assert set(row) == {"k_mean", "selected_fraction", "mass_kept", "first_token_mass"}
            continue
        if layer.config.selection.reuse:
            exact.append(exact[i - 1])
            selected = exact[i]
            assert selected is not None
            assert row["mass_kept"] == pytest.approx(float((dense * selected).sum()) / (2 * LENGTH))
            assert "share_8_lost" not in row
            continue
        selected, scores = exact_selection(layer, tokens)
        exact.append(selected)
        kept = float((dense * selected).sum())
        assert row["k_mean"] == pytest.approx(int(selected.sum()) / (2 * LENGTH))
        assert row["mass_kept"] == pytest.approx(kept / (2 * LENGTH))
        assert row["k_99"] == k_99(layer, dense, scores, starts)
        assert row["u32"] == pytest.approx(u32(selected))
        for share in SHARES:
            lost = 1 - float((dense * shared(selected, starts, share)).sum()) / kept
            assert row[f"share_{share}_lost"] == pytest.approx(lost, abs=1e-6)
        below = exact[i - 1] if i else None
        assert ("reuse_1_lost" in row) == (below is not None)
        if below is not None:
            assert row["reuse_1_lost"] == pytest.approx(1 - float((dense * below).sum()) / kept, abs=1e-6)


def test_the_model_is_left_as_it_was(draw: Draw) -> None:
    model, data = draw.model().train(), text(draw, across=False)
    layer_diagnostics(model, data, EvaluationConfig(sequences=1))
    assert model.training
    assert all(m.watch is None for m in model.modules() if isinstance(m, GatedSparseAttention))
