"""One precision for training, evaluation and generation, which on a GPU is the kernels'."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gsa.attention import attention
from gsa.attention.attention import GatedSparseAttention
from gsa.attention.chunked import attend_chunked
from gsa.attention.core import Asked, Parts, Projected
from gsa.attention.fused import attend_fused
from gsa.config import TrainConfig, build
from gsa.data.packing import Prepared, prepare
from gsa.evaluation.latency import measure_latency
from gsa.evaluation.layers import layer_diagnostics
from gsa.evaluation.report import evaluate_checkpoint
from gsa.model import GSAForCausalLM
from gsa.store import TrackingConfig
from gsa.training import checkpoint
from gsa.training.checkpoint import load_checkpoint
from gsa.training.loop import Trainer, make_model
from gsa.training.precision import autocast, uses_bf16
from tests.draw import Draw
from tests.gpu import needs_gpu
from tests.text import tiny

CPU, GPU = torch.device("cpu"), torch.device("cuda")
Core = Callable[[Parts, Projected, Asked], Any]


@pytest.mark.parametrize(
    ("precision", "on_cpu", "on_gpu"), [("auto", False, True), ("fp32", False, False), ("bf16", True, True)]
)
def test_auto_is_bf16_on_a_gpu_alone(precision: str, on_cpu: bool, on_gpu: bool) -> None:
    assert (uses_bf16(precision, CPU), uses_bf16(precision, GPU)) == (on_cpu, on_gpu)
    with autocast(precision, CPU):
        assert torch.is_autocast_enabled("cpu") == on_cpu


def layers_of(model: GSAForCausalLM) -> list[GatedSparseAttention]:
    return [module for module in model.modules() if isinstance(module, GatedSparseAttention)]


def watch(model: GSAForCausalLM) -> list[tuple[torch.dtype, Core]]:
    """The type of the queries, and the core, of each layer in each forward from now on."""
    seen: list[tuple[torch.dtype, Core]] = []
    for layer in layers_of(model):

        def see(parts: Parts, tokens: Projected, asked: Asked, layer: GatedSparseAttention = layer) -> None:
            seen.append((tokens.q.dtype, layer.choose_core(parts, tokens)))

        layer.watch = see
    return seen


def trained(draw: Draw, folder: Path, **changes: Any) -> tuple[TrainConfig, Prepared, Trainer]:
    config = build(TrainConfig, tiny(folder, draw.random.randrange(1000), **changes))
    data = prepare(config.data, Path(config.storage) / "data")
    trainer = Trainer(config, data, folder / "run")
    trainer.train(lambda step, metrics: None)
    return config, data, trainer


def assert_evaluated_as_in_training(config: TrainConfig, trainer: Trainer) -> None:
    report = evaluate_checkpoint(str(trainer.folder), TrackingConfig(), Path(config.storage))
    shared = {name: value for name, value in trainer.metrics.items() if name.startswith("held_out_")}
    assert "held_out_loss" in shared
    assert report.metrics == shared


def test_a_checkpoint_is_evaluated_and_generates_in_the_precision_that_it_was_trained_in(
    draw: Draw, tmp_path: Path
) -> None:
    config, data, trainer = trained(draw, tmp_path, training__precision="bf16")
    assert_evaluated_as_in_training(config, trainer)
    model = load_checkpoint(trainer.folder)
    seen = watch(model)
    tokens = model.generate(data.held_out.batch([0]).tokens[:, :5], 4)
    assert tokens.shape == (1, 9)
    assert {dtype for dtype, _ in seen} == {torch.bfloat16}
    assert len(seen) == 4 * config.model.num_layers
    seen.clear()
    model.precision = "fp32"
    model.generate(tokens, 1)
    assert {dtype for dtype, _ in seen} == {torch.float32}


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
def test_diagnostics_run_in_the_precision_of_the_model(draw: Draw, tmp_path: Path, precision: str) -> None:
    config = build(TrainConfig, tiny(tmp_path, draw.random.randrange(1000), training__precision=precision))
    data = prepare(config.data, tmp_path / "cache")
    model = make_model(config, data)
    seen: set[torch.dtype] = set()
    model.head.register_forward_hook(lambda module, given, logits: seen.add(logits.dtype))
    layer_diagnostics(model, data, config.evaluation)
    measure_latency(model, data, 32)  # modelled, from the selections that the model makes
    assert seen == {torch.bfloat16 if precision == "bf16" else torch.float32}


def test_weights_that_are_not_fp32_keep_their_type(draw: Draw) -> None:
    model = draw.model().eval()
    model.precision = "bf16"
    seen = watch(model)
    model.generate(draw.integers(0, 10, 1, 3), 2)
    assert {dtype for dtype, _ in seen} == {torch.float64}


def test_pytorch_in_place_of_the_kernels_is_reported_once_for_each_reason(
    draw: Draw, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_reported", set())
    layer = draw.layer(draw.config("fixed", "relu"), number=3)
    layer.config.backend = "auto"
    parts = Parts(layer.config, layer.indexer, layer.controller, False)

    def chosen(size: int, dtype: torch.dtype, device: str) -> Core:
        layer.config.head_dim = size
        with FakeTensorMode():
            q = torch.empty(1, 2, layer.config.num_heads, size, dtype=dtype, device=device)
            return layer.choose_core(parts, projected(q))

    with caplog.at_level(logging.WARNING, "gsa"):
        assert chosen(16, torch.bfloat16, "cuda") is attend_fused
        assert chosen(6, torch.float32, "cpu") is attend_chunked
        assert not caplog.records
        for _ in range(2):
            assert chosen(6, torch.bfloat16, "cuda") is attend_chunked
            assert chosen(16, torch.float64, "cuda") is attend_chunked
    first, second = (record.getMessage() for record in caplog.records)
    assert first == (
        "attention.backend = auto: layer 3 attends in PyTorch, not on the kernels: head_dim = 6 is none of 16, 32, 64, "
        "128; attention.backend = torch chooses this, triton refuses it"
    )
    assert "tensors are torch.float64" in second
    assert "set training.precision to auto or bf16" in second


def projected(q: Tensor) -> Projected:
    """Tokens of which only the queries are looked at."""
    none = q.new_empty(0)
    return Projected(none, q, none, none, None, None, none, none, none, False, False)


KERNELS = {"model__attention__head_dim": 16, "model__attention__indexer": {"num_heads": 1, "head_dim": 16}}


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_evaluation_and_generation_take_the_kernels(draw: Draw, tmp_path: Path) -> None:
    config, data, trainer = trained(draw, tmp_path, **KERNELS)
    report = evaluate_checkpoint(str(trainer.folder), TrackingConfig(), Path(config.storage))
    # the order in which a GPU adds is not fixed
    assert report.metrics["held_out_loss"] == pytest.approx(trainer.metrics["held_out_loss"], abs=1e-3)
    model = load_checkpoint(trainer.folder).cuda()
    seen = watch(model)
    model.generate(data.held_out.batch([0]).tokens[:, :5].cuda(), 4)
    assert set(seen) == {(torch.bfloat16, attend_fused)}


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_a_backend_that_must_be_triton_evaluates_and_generates(draw: Draw, tmp_path: Path) -> None:
    config, data, trainer = trained(draw, tmp_path, model__attention__backend="triton", **KERNELS)
    assert evaluate_checkpoint(str(trainer.folder), TrackingConfig(), Path(config.storage)).step == trainer.step
    found = checkpoint.latest(trainer.folder)
    assert found is not None
    assert checkpoint.load(found).cuda().generate(data.held_out.batch([0]).tokens[:, :5].cuda(), 4).shape == (1, 9)
