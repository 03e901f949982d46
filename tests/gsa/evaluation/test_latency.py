"""Latency as a metric: measured on a GPU, modelled elsewhere under the same names."""

import statistics
from pathlib import Path

import pytest
import torch

from gsa.config import TrainConfig, build
from gsa.data.packing import Prepared, prepare
from gsa.errors import RequestError
from gsa.evaluation.cost_model import modelled_cost
from gsa.evaluation.latency import interquartile_range, long_text, measure_latency
from gsa.model import GSAForCausalLM
from gsa.training.loop import make_model
from tests.draw import Draw
from tests.gpu import needs_gpu
from tests.text import tiny

NAMES = {
    "attention_latency_ms",
    "attention_latency_spread_ms",
    "attention_latency_measured",
    "peak_memory_gib",
}


def made(draw: Draw, folder: Path, head_dim: int = 8) -> tuple[Prepared, GSAForCausalLM]:
    changes = {"model__attention__head_dim": head_dim, "model__attention__indexer": {"num_heads": 1, "head_dim": 16}}
    config = build(TrainConfig, tiny(folder, draw.random.randrange(1000), **changes))
    data = prepare(config.data, folder / "cache")
    return data, make_model(config, data)


def test_without_a_gpu_the_modelled_cost_stands_in_and_says_so(draw: Draw, tmp_path: Path) -> None:
    data, model = made(draw, tmp_path)
    metrics = measure_latency(model.train(), data, 4096)
    assert model.training
    assert set(metrics) == NAMES
    assert metrics == measure_latency(model.eval(), data, 4096)
    assert not model.training
    assert metrics["attention_latency_measured"] == metrics["attention_latency_spread_ms"] == 0
    assert 0 < metrics["attention_latency_ms"] < measure_latency(model, data, 8192)["attention_latency_ms"]
    assert len(data.held_out) <= 4096 // 24  # so little text is looked at whole
    cost = modelled_cost(model, data.held_out.batch(range(len(data.held_out))).tokens, 4096)
    assert metrics["attention_latency_ms"] == cost.milliseconds
    assert metrics["peak_memory_gib"] == cost.workspace / 2**30


def test_a_target_shorter_than_the_context_and_one_of_a_single_token_can_be_asked_for(
    draw: Draw, tmp_path: Path
) -> None:
    data, model = made(draw, tmp_path)
    assert measure_latency(model, data, 1)["attention_latency_ms"] > 0
    for length, repeats in ((0, 7), (-1, 7), (16, 0)):
        with pytest.raises(RequestError, match=f"target_length = {length}, repeats = {repeats}"):
            measure_latency(model, data, length, repeats)


def test_text_that_is_too_short_is_repeated_from_its_start(draw: Draw, tmp_path: Path) -> None:
    data, _ = made(draw, tmp_path)
    text = torch.tensor(data.held_out.tokens.astype("int64"))
    for length in (1, 7, len(text), 2 * len(text) + 3):
        found = long_text(data.held_out, length)
        assert found.shape == (1, length)
        assert torch.equal(found[0], text.repeat(3)[:length])


def test_the_interquartile_range_holds_the_middle_half(draw: Draw) -> None:
    values = [draw.random.uniform(0, 1) for _ in range(9)]
    assert interquartile_range(values) == pytest.approx(sorted(values)[6] - sorted(values)[2])
    assert interquartile_range(values) <= max(values) - min(values)
    assert interquartile_range([statistics.mean(values)]) == 0


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_it_is_measured_beside_dense_attention(draw: Draw, tmp_path: Path) -> None:
    data, model = made(draw, tmp_path, head_dim=16)
    metrics = measure_latency(model.cuda(), data, 2048)
    assert set(metrics) == NAMES | {"attention_speedup"}
    assert metrics["attention_latency_measured"] == 1
    assert all(value >= 0 for value in metrics.values())
    assert metrics["attention_speedup"] > 0
    assert metrics["peak_memory_gib"] > 0
