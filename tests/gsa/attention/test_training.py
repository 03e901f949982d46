"""What each stage trains, whether its gradients are right, and how much memory they take."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gsa.attention.attention import GatedSparseAttention
from gsa.attention.config import Stage
from gsa.attention.gates import PLACES
from tests.draw import CONTROLLERS, INDEXERS, Draw


def gradients(layer: GatedSparseAttention, loss: Tensor | None) -> dict[str, bool]:
    """Which parameters the loss reaches with a gradient that is not all zero."""
    assert loss is not None
    names, parameters = zip(*layer.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in found)
    return {name: g is not None and bool(g.any()) for name, g in zip(names, found, strict=True)}


def of_indexer(name: str) -> bool:
    return name.startswith(("indexer.", "controller."))


@pytest.mark.parametrize("indexer", INDEXERS)
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_each_loss_reaches_its_own_parameters_and_no_others(draw: Draw, controller: str, indexer: str) -> None:
    config = draw.config(controller, indexer)
    config.gates.places = list(PLACES)
    config.controller.k_min, config.controller.k, config.controller.k_max = 4, 5, 8
    layer = draw.layer(config)
    hidden = draw.hidden(layer, 2, 20)
    for stage in ("dense", "warmup", "sparse"):
        result = layer.attend(hidden, stage=stage, indexer_loss=True)
        reached = gradients(layer, result.output.square().sum())
        assert reached == {name: not of_indexer(name) for name in reached}
        if stage == "dense":
            assert result.indexer_loss is None
        else:
            reached = gradients(layer, result.indexer_loss)
            assert reached == {name: of_indexer(name) for name in reached}


def test_the_indexers_loss_reaches_no_hidden_state(draw: Draw) -> None:
    layer = draw.layer(draw.config())
    hidden = draw.hidden(layer, 2, 9).requires_grad_()
    loss = layer.attend(hidden, indexer_loss=True).indexer_loss
    assert loss is not None
    (gradient,) = torch.autograd.grad(loss, hidden, allow_unused=True)
    assert gradient is None


def test_the_indexers_loss_is_nothing_where_the_indexer_agrees_with_attention(draw: Draw) -> None:
    """All scores equal and all attention equal: KL is 0."""
    config = draw.config("fixed")
    layer = draw.layer(config)
    assert layer.indexer is not None
    torch.nn.init.zeros_(layer.indexer.query.weight)
    torch.nn.init.zeros_(layer.query.weight)
    loss = layer.attend(draw.hidden(layer, 2, 9), indexer_loss=True).indexer_loss
    assert loss is not None
    assert abs(float(loss)) < 1e-12


@pytest.mark.parametrize("indexer", INDEXERS)
def test_descending_the_indexers_loss_lowers_it(draw: Draw, indexer: str) -> None:
    layer = draw.layer(draw.config(indexer=indexer))
    hidden = draw.hidden(layer, 2, 12)
    optimizer = torch.optim.Adam([p for n, p in layer.named_parameters() if n.startswith("indexer.")], lr=0.01)
    losses = []
    for _ in range(15):
        loss = layer.attend(hidden, stage="warmup", indexer_loss=True).indexer_loss
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def check_gradients(
    layer: GatedSparseAttention,
    names: list[str],
    run: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
) -> None:
    """Hold autograd to finite differences of `run` in the named parameters and in the inputs."""
    values = [dict(layer.named_parameters())[name].detach().requires_grad_() for name in names]

    def of(*arguments: Tensor) -> Tensor:
        parameters = dict(zip(names, arguments[: len(names)], strict=True))
        return run(parameters, *arguments[len(names) :])

    assert torch.autograd.gradcheck(of, (*values, *inputs), eps=1e-6, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_gradients_of_outputs_equal_finite_differences(draw: Draw, stage: Stage) -> None:
    """In parameters and hidden states; a selection does not move with either, away from ties: here it is given."""
    config = draw.config(reuse=1)
    config.gates.places = draw.random.sample(PLACES, 3)
    layer = draw.layer(config, number=1)
    lower = draw.lower(torch.zeros(1, 4, dtype=torch.long))

    def run(parameters: dict[str, Tensor], hidden: Tensor) -> Tensor:
        output: Tensor = functional_call(_Output(layer, stage, lower), _under("layer", parameters), (hidden,))
        return output

    names = [name for name, _ in layer.named_parameters()]
    check_gradients(layer, names, run, (draw.hidden(layer, 1, 4).requires_grad_(),))


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
@pytest.mark.parametrize("indexer", INDEXERS)
@pytest.mark.slow
def test_gradients_of_the_indexers_loss_equal_finite_differences(draw: Draw, indexer: str, stage: Stage) -> None:
    layer = draw.layer(draw.config("learned", indexer, coarse=None))
    hidden = draw.hidden(layer, 1, 6)

    def run(parameters: dict[str, Tensor]) -> Tensor:
        loss: Tensor = functional_call(_IndexerLoss(layer, stage), _under("layer", parameters), (hidden,))
        return loss

    check_gradients(layer, [name for name, _ in layer.named_parameters() if of_indexer(name)], run, ())


class _Output(torch.nn.Module):
    def __init__(self, layer: GatedSparseAttention, stage: Stage, lower: Tensor | None) -> None:
        super().__init__()
        self.layer, self.stage, self.lower = layer, stage, lower

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer.attend(hidden, stage=self.stage, lower=self.lower).output


class _IndexerLoss(torch.nn.Module):
    def __init__(self, layer: GatedSparseAttention, stage: Stage) -> None:
        super().__init__()
        self.layer, self.stage = layer, stage

    def forward(self, hidden: Tensor) -> Tensor:
        loss = self.layer.attend(hidden, stage=self.stage, indexer_loss=True).indexer_loss
        assert loss is not None
        return loss


def _under(name: str, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for key, value in parameters.items()}


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_no_tensor_grows_with_tokens_squared_times_heads_or_channels(draw: Draw, controller: str) -> None:
    length, chunk, heads = 512, 64, 4
    config = draw.config(controller)
    config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim = 16, heads, 2, 8
    config.indexer.num_heads, config.query_chunk = heads, chunk
    layer = draw.layer(config, dtype=torch.float32)
    hidden = draw.hidden(layer, 1, length).requires_grad_()
    with LargestTensor() as mode:
        result = layer.attend(hidden, keep_selection=True, indexer_loss=True, measure=True)
        assert result.indexer_loss is not None
        (result.output.sum() + result.indexer_loss).backward()
    assert mode.largest >= length * length  # the selection itself: the record is working
    assert mode.largest <= 4 * heads * chunk * length  # fp32 scores of one chunk, a quarter of [T, T, d] in bytes / d
