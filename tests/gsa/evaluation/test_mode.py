"""Whatever looks at a model leaves each of its modules in the mode it was in, also where it fails."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gsa.config import TrainConfig, build
from gsa.data.packing import Prepared, prepare
from gsa.evaluation.latency import measure_latency
from gsa.evaluation.layers import layer_diagnostics
from gsa.evaluation.loss import EvaluationConfig, evaluate
from gsa.evaluation.mode import evaluating
from gsa.evaluation.retrieval import LINE, retrieve
from gsa.model import GSAForCausalLM
from gsa.training.loop import make_model
from gsa.training.workers import Workers
from tests.draw import Draw
from tests.text import tiny

FEW = EvaluationConfig(sequences=2, batch_size=2)
Use = Callable[[GSAForCausalLM, Prepared], Any]
USES: dict[str, Use] = {
    "evaluate": lambda model, data: evaluate(model, data, FEW, "sparse", Workers(0, 1, torch.device("cpu"))),
    "generate": lambda model, data: model.generate(torch.zeros(1, 3, dtype=torch.long), 2),
    "layer_diagnostics": lambda model, data: layer_diagnostics(model, data, FEW),
    "measure_latency": lambda model, data: measure_latency(model, data, 32),
    "retrieve": lambda model, data: retrieve(model, data, 5 * len(LINE), trials=1),
}


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def fail(*given: Any) -> None:
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("use", USES)
def test_every_module_gets_its_own_mode_back_also_after_an_exception(draw: Draw, tmp_path: Path, use: str) -> None:
    config = build(TrainConfig, tiny(tmp_path, draw.random.randrange(1000)))
    data = prepare(config.data, tmp_path / "cache")
    model = make_model(config, data).train()
    model.blocks[0].eval()
    before, seen = modes(model), []
    watching = model.norm.register_forward_pre_hook(lambda *given: seen.append(any(modes(model).values())))
    USES[use](model, data)
    assert modes(model) == before
    assert not any(seen)
    assert seen
    watching.remove()
    model.norm.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        USES[use](model, data)
    assert modes(model) == before


def test_evaluation_mode_may_be_nested() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with evaluating(model):
        with evaluating(model):
            assert not any(modes(model).values())
        assert not any(modes(model).values())
    assert modes(model) == {"": True, "0": True, "1": False}
