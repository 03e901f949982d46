"""Random layers, models and inputs, all of them drawn from one seed (`tests.seeds`)."""

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gsa.attention.attention import GatedSparseAttention
from gsa.attention.config import AttentionConfig
from gsa.attention.controller import ControllerConfig
from gsa.attention.gates import PLACES, GateConfig
from gsa.attention.indexer import IndexerConfig
from gsa.attention.selection import CoarseConfig, SelectionConfig
from gsa.model import GSAForCausalLM, LayerConfig, ModelConfig
from gsa.settings import check

CONTROLLERS = ("fixed", "ratio", "threshold", "variance", "entropy", "learned")
INDEXERS = ("gated_sigmoid", "sigmoid", "relu")


class Draw:
    """Draws everything from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers from low to high, both included."""
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def config(self, controller: str | None = None, indexer: str | None = None, **selection: Any) -> AttentionConfig:
        """Small settings at random; what is named is as named."""
        pick = self.random.choice
        heads = pick([1, 2, 4])
        kv_heads = pick([n for n in (1, 2, 4) if heads % n == 0])
        k_min = pick([1, 2, 3])
        k = k_min + pick([0, 1, 4])
        indexer_heads = pick([1, 2, 3])
        coarse = CoarseConfig(block=pick([1, 2, 3, 4]), candidates=pick([1, 2]))
        drawn: dict[str, Any] = {
            "local_window": pick([0, 0, 1, 3]),
            "sink_tokens": pick([0, 0, 1, 3]),
            "share": pick([1, 1, 2, 4]),
            "coarse": pick([None, coarse]),
        }
        config = AttentionConfig(
            hidden_size=heads * pick([3, 4]),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=pick([2, 4, 6]),
            gates=GateConfig(
                places=[place for place in PLACES if self.random.random() < 0.5],
                granularity=pick(["element", "head"]),
                activation=pick(["sigmoid", "silu", "none"]),
            ),
            indexer=IndexerConfig(
                kind=indexer or pick(INDEXERS),
                num_heads=indexer_heads,
                head_dim=pick([2, 4]),
                rope=pick([True, False]),
                temperature=pick([1.0, 10.0]),
            ),
            controller=ControllerConfig(
                kind=controller or pick(CONTROLLERS),
                k=k,
                k_min=k_min,
                k_max=k + pick([0, 1, 4]),
                ratio=self.random.uniform(0.05, 1),
                threshold=self.random.uniform(0, indexer_heads),
                temperature=pick([0.0, 1.0, 3.0]),
                target_mass=self.random.uniform(0.3, 0.9),
            ),
            selection=SelectionConfig(**(drawn | selection)),
            query_chunk=pick([1, 3, 5, 100]),
        )
        check(config, "attention")
        return config

    def layer(
        self, config: AttentionConfig, number: int = 0, dtype: torch.dtype = torch.float64
    ) -> GatedSparseAttention:
        layer = GatedSparseAttention(config, number).to(dtype)
        self.fill(layer)
        return layer

    def model(self, dtype: torch.dtype = torch.float64, **common: Any) -> GSAForCausalLM:
        """Four layers: of random settings; that reuses the first; that shares windows; dense or with its own k."""
        common = {"share": 1} | common
        attention = self.config(**common)
        attention.indexer.rope = (
            True  # else a repeated token's scores tie in the first layer, and rounding breaks the tie
        )
        last = self.random.choice([LayerConfig(sparse=False), LayerConfig(k=attention.controller.k_max)])
        layers = [LayerConfig(), LayerConfig(reuse=1), LayerConfig(share=self.random.choice([2, 4])), last]
        config = ModelConfig(
            num_layers=4,
            intermediate_size=12,
            vocab_size=11,
            tie_embeddings=self.random.choice([True, False]),
            attention=attention,
            layers=layers,
        )
        check(config, "model")
        model = GSAForCausalLM(config).to(dtype)
        self.fill(model)
        return model

    def fill(self, module: nn.Module) -> None:
        """New weights, of a scale that keeps activations near 1, and new references for the controllers."""
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.5
                if not name.endswith("norm.weight"):
                    parameter.copy_(scale * self.normal(*parameter.shape))
            for name, buffer in module.named_buffers():
                if name.endswith("reference"):
                    buffer.fill_(self.random.uniform(0.01, 1))

    def hidden(self, layer: GatedSparseAttention, batch: int, length: int) -> Tensor:
        return self.normal(batch, length, layer.config.hidden_size, dtype=layer.out.weight.dtype)

    def starts(self, batch: int, length: int) -> Tensor:
        """Rows packed with documents of random lengths."""
        first = self.integers(0, 3, batch, length) == 0
        return torch.where(first, torch.arange(length), 0).cummax(1).values

    def lower(self, starts: Tensor) -> Tensor:
        """A selection from another layer: any visible keys, the query's own among them."""
        length = starts.shape[1]
        keys = torch.arange(length)
        visible = (keys >= starts[..., None]) & (keys <= keys[:, None])
        return (visible & (self.integers(0, 1, *visible.shape) == 1)) | torch.eye(length, dtype=torch.bool)

    def splits(self, length: int) -> Iterator[slice]:
        """Cut a sequence into calls of none, one or many tokens."""
        first = 0
        while first < length:
            last = min(length, first + self.random.choice([0, 1, 1, 2, 5]))
            yield slice(first, last)
            first = last
