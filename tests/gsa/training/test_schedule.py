"""The learning rate, the stages and the count of spikes, each against its definition."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from gsa.model import GSAForCausalLM, LayerConfig
from gsa.training.optimizer import (
    OptimizerConfig,
    clip,
    load_optimizer,
    make_optimizer,
    schedule,
    set_learning_rate,
)
from gsa.training.spikes import SpikeCounter
from gsa.training.stages import Plan, StageConfig, freeze
from tests.draw import CONTROLLERS, INDEXERS, Draw


def test_the_rate_rises_in_a_line_and_falls_in_a_cosine(draw: Draw) -> None:
    warmup, total, final = draw.random.randint(1, 50), draw.random.randint(60, 500), draw.random.random()
    config = OptimizerConfig(warmup_steps=warmup, final_ratio=final)
    rates = [schedule(config, step, total) for step in range(total)]
    assert rates[:warmup] == pytest.approx([(i + 1) / warmup for i in range(warmup)])
    assert max(rates) == pytest.approx(1)
    assert all(a > b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    assert schedule(config, total, total) == pytest.approx(final)
    middle = warmup + (total - warmup) / 2
    assert schedule(config, int(middle), total) == pytest.approx((1 + final) / 2, abs=0.03)


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("indexer", INDEXERS)
def test_the_indexer_learns_at_its_own_rate_and_only_matrices_decay(draw: Draw, controller: str, indexer: str) -> None:
    model = draw.model(dtype=torch.float32, controller=controller, indexer=indexer)
    config = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, indexer_ratio=7.0, weight_decay=0.3)
    optimizer = make_optimizer(model, config)
    rate = set_learning_rate(optimizer, config, 0, 10)
    assert rate == pytest.approx(1e-3)
    settings = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(settings)
    assert len(settings) == len(list(model.parameters()))
    apart = 0
    for name, p in model.named_parameters():
        group, of_indexer = settings[id(p)], ".indexer." in name or ".controller." in name
        assert group["lr"] == pytest.approx(7e-3 if of_indexer else 1e-3), name
        assert group["weight_decay"] == (0.3 if p.ndim >= 2 else 0), name
        apart += of_indexer and p.ndim < 2
    assert apart  # biases of heads, of their weights, of a learned controller


def test_a_vector_without_gradient_stays_and_a_matrix_decays(draw: Draw) -> None:
    model = draw.model(dtype=torch.float32, controller="learned")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, indexer_ratio=2.0, weight_decay=0.5)
    optimizer = make_optimizer(model, config)
    set_learning_rate(optimizer, config, 0, 10)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        ratio = 2.0 if ".indexer." in name or ".controller." in name else 1.0
        assert_close(p.detach(), before[name] * (1 - 1e-2 * ratio * 0.5 if p.ndim >= 2 else 1), msg=name)


def adamw_of_three_groups(model: GSAForCausalLM, config: OptimizerConfig) -> torch.optim.AdamW:
    """As checkpoints hold it that were written before the indexer's vectors were told apart: without names."""
    indexer = {id(p) for p in model.indexer_parameters()}
    rest = [p for p in model.parameters() if id(p) not in indexer]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim >= 2], "ratio": 1.0},
        {"params": [p for p in rest if p.ndim < 2], "ratio": 1.0, "weight_decay": 0.0},
        {"params": model.indexer_parameters(), "ratio": config.indexer_ratio},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_saved_optimizer_is_taken_up_parameter_by_parameter(draw: Draw, old: bool, sparse: bool) -> None:
    model = draw.model(dtype=torch.float32, controller="learned")
    if not sparse:
        layers = [LayerConfig(sparse=False)] * 4
        model = GSAForCausalLM(dataclasses.replace(model.config, layers=layers))
    config = OptimizerConfig()
    saved = adamw_of_three_groups(model, config) if old else make_optimizer(model, config)
    silent = draw.random.choice([name for name, _ in model.named_parameters()])  # a stage may not have trained it
    for name, p in model.named_parameters():
        p.grad = None if name == silent else draw.normal(*p.shape, dtype=torch.float32)
    saved.step()
    again = make_optimizer(model, config)
    load_optimizer(again, model, saved.state_dict())
    for name, p in model.named_parameters():
        assert (p in again.state) == (name != silent), name
        for key in ("step", "exp_avg", "exp_avg_sq") if name != silent else ():
            assert torch.equal(again.state[p][key], saved.state[p][key]), name
    assert [len(group["params"]) for group in again.param_groups] == [
        len(group["params"]) for group in make_optimizer(model, config).param_groups
    ]


def test_clipping_bounds_the_norm_and_gives_what_it_was(draw: Draw) -> None:
    parameters = [torch.nn.Parameter(draw.normal(3, 4)) for _ in range(3)]
    for p in parameters[:2]:
        p.grad = draw.normal(3, 4)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters[:2] if p.grad is not None))
    assert clip(parameters, norm * 2) == pytest.approx(norm)
    assert clip(parameters, norm / 2) == pytest.approx(norm)
    assert clip(parameters, norm) == pytest.approx(norm / 2, rel=1e-5)
    assert clip(parameters[2:], 1.0) == 0


def test_stages_follow_one_another_and_a_model_without_indexer_skips_warmup() -> None:
    stages = [StageConfig("dense", 3), StageConfig("warmup", 2), StageConfig("sparse", 2)]
    assert [Plan(stages, True).stage(i) for i in range(8)] == ["dense"] * 3 + ["warmup"] * 2 + ["sparse"] * 3
    assert [Plan(stages, False).stage(i) for i in range(5)] == ["dense"] * 3 + ["sparse"] * 2
    assert (Plan(stages, True).total_steps, Plan(stages, False).total_steps) == (7, 5)


def test_freezing_drops_stale_gradients(draw: Draw) -> None:
    model = draw.model(dtype=torch.float32)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    freeze(model, "warmup")
    assert all((p.grad is None) != p.requires_grad for p in model.parameters())
    freeze(model, "sparse")
    assert all(p.requires_grad for p in model.parameters())


def test_spikes_are_counted_as_defined(draw: Draw) -> None:
    counter, losses = SpikeCounter(), [draw.random.gauss(3, 0.02) for _ in range(200)]
    for step in (10, 60, 150):
        losses[step] += 5
    for loss in losses:
        counter.add(loss)
    assert counter.count == 2  # the first came before there were enough steps to judge by
    again = SpikeCounter()
    for i, loss in enumerate(losses):
        if i == 100:
            again.load_state_dict(SpikeCounter().state_dict() | again.state_dict())
        again.add(loss)
    assert again.count == counter.count
    counter.new_stage()
    counter.add(1e9)
    assert counter.count == 2


def test_a_flat_loss_has_no_spikes_however_small_its_deviation() -> None:
    counter = SpikeCounter()
    for i in range(100):
        counter.add(2.0 + (0.09 if i == 80 else 0))
    assert counter.count == 0
