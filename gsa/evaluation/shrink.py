"""A training configuration's small copy: the same structure, on tens of tokens and channels.

- Numbers of keys, tokens and channels shrink; kinds, gates, biases and temperatures stay.
- Numbers of keys keep their order, and a selection leaves keys out.
- Layers of equal settings, equal down to the layers they reuse, stand for each other.
"""

import dataclasses
import functools
import json
import math
from typing import Any, NamedTuple

from gsa.attention.config import AttentionConfig, Stage
from gsa.attention.controller import ControllerConfig
from gsa.attention.indexer import IndexerConfig
from gsa.attention.selection import CoarseConfig, SelectionConfig
from gsa.config import TrainConfig, build
from gsa.model import LAYER_SETTINGS, LayerConfig, ModelConfig
from gsa.training.stages import STAGES

TOKENS = 64
CHUNK = 24  # queries at once, where real sequences have several chunks; the last one is shorter
VOCAB, HIDDEN, HEAD_DIM, INTERMEDIATE = 32, 64, 8, 32
KV_HEADS, GROUP, INDEXER_HEADS = 2, 3, 4
FEWEST_KEYS = 4  # kept by a query that keeps several: rounding down to one would leave its softmax nothing to learn
BLOCK, CANDIDATES = 4, 2


@dataclasses.dataclass(frozen=True)
class Small:
    """What the gate's checks run on."""

    model: ModelConfig
    context_length: int
    stages: tuple[Stage, ...]  # those that have steps
    attend_across_documents: bool
    checkpoint_activations: bool
    layers: tuple[int, ...]  # which of the configuration's layers each one of `model` is

    def __hash__(self) -> int:
        return hash(json.dumps(dataclasses.asdict(self), sort_keys=True))

    @classmethod
    def of(cls, data: dict[str, Any]) -> "Small":
        """From plain data, checked; raises RequestError."""
        data = dict(data)
        model = build(ModelConfig, data.pop("model"))
        stages, layers = tuple(data.pop("stages")), tuple(data.pop("layers"))
        return cls(model=model, stages=stages, layers=layers, **data)


def shrink(config: TrainConfig, vocab_size: int) -> Small:
    """The small copy of a checked configuration, for a tokenizer of `vocab_size` tokens."""
    with_steps = [stage for stage in config.training.stages if stage.steps]
    longest = max((stage.context_length or config.data.context_length for stage in with_steps), default=1)
    model, scale = config.model, _Scale.of(longest)
    layers = [_attention(model.attention_of(i), scale) for i in range(model.num_layers)]
    kept = _distinct(layers)
    asked = {stage.kind for stage in with_steps}
    return Small(
        model=dataclasses.replace(
            model,
            num_layers=len(kept),
            intermediate_size=min(model.intermediate_size, INTERMEDIATE),
            vocab_size=min(model.vocab_size or vocab_size, VOCAB),
            attention=_attention(model.attention, scale),
            layers=[_layer(layers, kept, i) for i in kept],
        ),
        context_length=scale.tokens,
        stages=tuple(s for s in STAGES if s in asked and (model.has_indexer or s != "warmup")),
        attend_across_documents=config.data.attend_across_documents,
        checkpoint_activations=config.training.checkpoint_activations,
        layers=tuple(kept),
    )


class _Scale(NamedTuple):
    real: int  # tokens of a real sequence
    tokens: int

    @classmethod
    def of(cls, context_length: int) -> "_Scale":
        return cls(context_length, min(context_length, TOKENS))

    def length(self, tokens: int, least: int = 1) -> int:
        """A number of tokens in proportion; what is longer than a sequence stays so, none stays none."""
        return min(tokens, max(least, round(tokens * self.tokens / self.real)), 2 * self.tokens)

    def keys(self, k: int) -> int:
        """A number of kept keys, a quarter of the tokens at most; non-decreasing in `k`.

        By powers, not in proportion: 256 and 4096 of 128K keys shall differ among 64 too.
        """
        most = max(self.tokens / 4, 1)
        scaled = most ** min(1.0, math.log(k) / math.log(self.real)) if self.real > TOKENS else min(k, most)
        return min(k, max(FEWEST_KEYS, round(scaled)))


def _attention(config: AttentionConfig, scale: _Scale) -> AttentionConfig:
    kv_heads = min(config.num_kv_heads, KV_HEADS)
    heads = kv_heads * min(config.num_heads // config.num_kv_heads, GROUP)
    by_head = "G5" in config.gates.places and config.gates.granularity == "head"  # needs heads that divide the width
    hidden = config.hidden_size
    if hidden > HIDDEN or (by_head and hidden % heads):
        hidden = 16 * heads
    indexer_heads = min(config.indexer.num_heads, INDEXER_HEADS)
    return dataclasses.replace(
        config,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=min(config.head_dim, HEAD_DIM),
        indexer=dataclasses.replace(
            config.indexer, num_heads=indexer_heads, head_dim=min(config.indexer.head_dim, HEAD_DIM)
        ),
        controller=_controller(config.controller, config.indexer, indexer_heads, scale),
        selection=_selection(config.selection, config.sparse, scale),
        backend="torch",
        query_chunk=scale.tokens if config.query_chunk >= scale.real else min(CHUNK, -(-scale.tokens // 2)),
    )


def _controller(config: ControllerConfig, indexer: IndexerConfig, heads: int, scale: _Scale) -> ControllerConfig:
    most = scale.keys(math.ceil(config.ratio * scale.real))
    k_min, k_max = scale.keys(config.k_min), scale.keys(config.k_max)
    return dataclasses.replace(
        config,
        k=scale.keys(config.k),
        k_min=k_min,
        k_max=max(k_max, k_min + (config.k_min < config.k_max)),  # what can vary still can
        ratio=max(config.ratio, min(1.0, most / scale.tokens)),
        threshold=config.threshold * heads / indexer.num_heads,  # scores are sums over the heads
    )


def _selection(config: SelectionConfig, sparse: bool, scale: _Scale) -> SelectionConfig:
    coarse = config.coarse
    if coarse is not None:
        coarse = CoarseConfig(min(scale.length(coarse.block, 2), BLOCK), min(coarse.candidates, CANDIDATES))
    return dataclasses.replace(
        config,
        local_window=scale.length(config.local_window),
        sink_tokens=scale.length(config.sink_tokens),
        share=1 << round(math.log2(scale.length(config.share, 2))),
        reuse=config.reuse if sparse else 0,
        coarse=coarse,
    )


def _distinct(layers: list[AttentionConfig]) -> list[int]:
    """The first layer of each kind, the layers that these reuse, and two layers at least where there are two."""
    kinds: dict[tuple[str, int], int] = {}  # by settings and the kind of the layer that is reused
    kind_of: list[int] = []
    first: dict[int, int] = {}
    for i, layer in enumerate(layers):
        below = kind_of[i - layer.selection.reuse] if layer.selection.reuse else -1
        settings = dataclasses.replace(layer, selection=dataclasses.replace(layer.selection, reuse=0))
        kind_of.append(kinds.setdefault((repr(settings), below), len(kinds)))
        first.setdefault(kind_of[i], i)
    kept = set(first.values()) | set(range(min(2, len(layers))))
    for i in sorted(kept, reverse=True):
        while layers[i].selection.reuse:
            i -= layers[i].selection.reuse
            kept.add(i)
    return sorted(kept)


def _layer(layers: list[AttentionConfig], kept: list[int], layer: int) -> LayerConfig:
    """Everything that a kept layer may set for itself, with what it reuses counted among the kept ones."""
    settings: dict[str, Any] = {
        name: functools.reduce(getattr, path, layers[layer]) for name, path in LAYER_SETTINGS.items() if name != "reuse"
    }
    below = layers[layer].selection.reuse
    return LayerConfig(**settings, reuse=kept.index(layer) - kept.index(layer - below) if below else 0)
