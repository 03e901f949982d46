"""The decoder: token embedding, blocks of gated sparse attention and SwiGLU, RMSNorm before each, and a head.

- Plain single-device PyTorch: it does not know how it is distributed, nor what trains it.
- `layers` overrides attention settings layer by layer.
- A block passes its selection up to the layers that reuse it.
"""

import contextlib
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gsa.attention.attention import AttentionResult, GatedSparseAttention
from gsa.attention.cache import Cache
from gsa.attention.config import AttentionConfig, Stage
from gsa.attention.controller import Uncertainty
from gsa.attention.statistics import Sums
from gsa.errors import ConfigError, RequestError
from gsa.evaluation.mode import evaluating
from gsa.sampling import sample
from gsa.settings import check, join, setting
from gsa.training.precision import autocast

# what a layer may set for itself, and the setting of model.attention that it replaces
LAYER_SETTINGS = {
    "sparse": ("sparse",),
    "k": ("controller", "k"),
    "ratio": ("controller", "ratio"),
    "threshold": ("controller", "threshold"),
    "share": ("selection", "share"),
    "reuse": ("selection", "reuse"),
    "local_window": ("selection", "local_window"),
    "sink_tokens": ("selection", "sink_tokens"),
    "gates": ("gates", "places"),
}


@dataclasses.dataclass
class LayerConfig:
    """One layer's own settings; null takes the one of `model.attention`."""

    sparse: bool | None = setting(None, "attention.sparse of this layer")
    k: int | None = setting(None, "attention.controller.k of this layer")
    ratio: float | None = setting(None, "attention.controller.ratio of this layer")
    threshold: float | None = setting(None, "attention.controller.threshold of this layer")
    share: int | None = setting(None, "attention.selection.share of this layer")
    reuse: int | None = setting(None, "attention.selection.reuse of this layer")
    local_window: int | None = setting(None, "attention.selection.local_window of this layer")
    sink_tokens: int | None = setting(None, "attention.selection.sink_tokens of this layer")
    gates: list[str] | None = setting(None, "attention.gates.places of this layer")


MOST_LAYERS = 1024  # beyond is a slip of the keyboard


@dataclasses.dataclass
class ModelConfig:
    num_layers: int = setting(4, "blocks", ge=1, le=MOST_LAYERS)
    intermediate_size: int = setting(768, "width of the SwiGLU", ge=1)
    vocab_size: int | None = setting(None, "size of the vocabulary; null takes the tokenizer's", ge=2)
    tie_embeddings: bool = setting(True, "the head shares the embedding's weights")
    norm_eps: float = setting(1e-6, "added to the mean square in RMSNorm", gt=0)
    attention: AttentionConfig = setting(AttentionConfig, "every layer's attention, where `layers` says nothing else")
    layers: list[LayerConfig] = setting(list, "settings of single layers, by number; may be shorter than num_layers")

    def check(self, prefix: str) -> None:
        if len(self.layers) > self.num_layers:
            raise ConfigError(join(prefix, "layers"), len(self.layers), f"must have <= num_layers = {self.num_layers}")
        # Layers beyond are like these: a reused layer lies below the first that reuses it, so among `layers`.
        for i in range(min(self.num_layers, 2 * len(self.layers) + 1)):
            layer = self.attention_of(i)
            names = {join(f"{prefix}.layers[{i}]", ".".join(path)): name for name, path in LAYER_SETTINGS.items()}
            try:
                check(layer, f"{prefix}.layers[{i}]")
                reuse = layer.selection.reuse
                if layer.sparse and reuse and (reuse > i or not self.attention_of(i - reuse).sparse):
                    key = join(f"{prefix}.layers[{i}]", "selection.reuse")
                    raise ConfigError(key, reuse, f"layer {i} has no selection {reuse} layers below it to reuse")
            except ConfigError as error:
                own = names.get(error.key)
                key = error.key.replace(f"layers[{i}]", "attention") if own is None else f"{prefix}.layers[{i}].{own}"
                raise ConfigError(key, error.value, error.allowed) from None

    @property
    def has_indexer(self) -> bool:
        """Whether some layer selects keys by an indexer of its own: only then is there anything to warm up."""
        layers = (self.attention_of(i) for i in range(self.num_layers))
        return any(layer.sparse and not layer.selection.reuse for layer in layers)

    def attention_of(self, layer: int) -> AttentionConfig:
        """The attention settings of one layer, its own laid over the common ones."""
        attention = self.attention
        if layer >= len(self.layers):
            return attention
        for name, path in LAYER_SETTINGS.items():
            value = getattr(self.layers[layer], name)
            if value is not None:
                attention = _replace(attention, path, value)
        return attention


@dataclasses.dataclass
class ModelOutput:
    logits: Tensor  # [B, T, V]
    indexer_loss: Tensor | None  # mean over the layers that have one
    uncertainty: Tensor | None  # [L, 2] sums and numbers of the controllers' statistics; zeros where there is none
    statistics: Sums  # [L] each, NaN where a layer lacks it; only when measured
    max_activation: Tensor | None  # [L], largest of the residual stream after each block; only when measured


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        hidden = config.attention.hidden_size
        self.attention_norm = nn.RMSNorm(hidden, eps=config.norm_eps)
        self.attention = GatedSparseAttention(config.attention_of(layer), layer)
        self.mlp_norm = nn.RMSNorm(hidden, eps=config.norm_eps)
        self.gate_up = nn.Linear(hidden, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, hidden, bias=False)

    def forward(self, hidden: Tensor, starts: Tensor | None, options: dict[str, Any]) -> tuple[Tensor, AttentionResult]:
        result = self.attention.attend(self.attention_norm(hidden), starts, **options)
        hidden = hidden + result.output
        gate, up = self.gate_up(self.mlp_norm(hidden)).chunk(2, dim=-1)
        return hidden + self.down(F.silu(gate) * up), result


class GSAForCausalLM(nn.Module):
    """A causal language model: tokens [B, T] to logits [B, T, V].

    Args:
        config: `vocab_size` must be set.
        precision: `training.precision`, in which `generate` and evaluations run; `forward` leaves it to its caller.

    Raises:
        ConfigError: `vocab_size` is null.
    """

    def __init__(self, config: ModelConfig, precision: str = "auto") -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ConfigError("model.vocab_size", None, "must be set to build a model without a tokenizer")
        self.config, self.precision = config, precision
        self.embedding = nn.Embedding(config.vocab_size, config.attention.hidden_size)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = nn.RMSNorm(config.attention.hidden_size, eps=config.norm_eps)
        self.head = nn.Linear(config.attention.hidden_size, config.vocab_size, bias=False)
        configs = [config.attention_of(i) for i in range(config.num_layers)]
        self._reused = {i - c.selection.reuse for i, c in enumerate(configs) if c.sparse and c.selection.reuse}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with deviation 0.02, less for what writes to the residual stream; gates keep their own."""
        residual = 0.02 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and ".gates." not in name:
                nn.init.normal_(parameter, std=residual if name.endswith(("out.weight", "down.weight")) else 0.02)
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, *, starts: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Logits [B, T, V] of the token after each of `tokens` [B, T].

        Args:
            tokens: integers below V. T may be 0.
            starts: [B, T], the first position of each token's document (counted from the cache's first token, where
                there is a cache): tokens attend no further back. `None`: the row is one document.
            cache: holds the tokens before these, and takes these in.
        """
        return self.run(tokens, starts=starts, cache=cache).logits

    def run(
        self,
        tokens: Tensor,
        *,
        starts: Tensor | None = None,
        cache: Cache | None = None,
        stage: Stage = "sparse",
        indexer_loss: bool = False,
        measure: bool = False,
        checkpoint_activations: bool = False,
    ) -> ModelOutput:
        """`forward` with what training and diagnosis want to know; the options are those of the attention layer."""
        batch, length = tokens.shape
        all_starts = starts  # None says that no document starts later, which needs no mask
        if starts is not None or cache is not None:
            all_starts = (cache or Cache(0)).extend_starts(starts, batch, length, tokens.device)
        hidden = self.embedding(tokens)
        results: list[AttentionResult] = []
        largest: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            attention = self.config.attention_of(i)
            reuse = attention.selection.reuse if attention.sparse else 0
            options = {
                "stage": stage,
                "cache": None if cache is None else cache.layers[i],
                "lower": results[i - reuse].selection if reuse else None,
                "keep_selection": i in self._reused,
                "indexer_loss": indexer_loss,
                "measure": measure,
            }
            if checkpoint_activations:
                hidden, result = checkpoint(block, hidden, all_starts, options, use_reentrant=False)
            else:
                hidden, result = block(hidden, all_starts, options)
            results.append(result)
            if measure and hidden.numel():
                largest.append(hidden.detach().abs().amax().float().cpu())
        losses = [r.indexer_loss for r in results if r.indexer_loss is not None]
        return ModelOutput(
            logits=self.head(self.norm(hidden)),
            indexer_loss=torch.stack(losses).mean() if losses else None,
            uncertainty=_stack_uncertainty(results),
            statistics=_by_layer(results),
            max_activation=torch.stack(largest) if largest else None,
        )

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, max_new_tokens: int = 64, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> Tensor:
        """Continue `tokens` [B, T], T ≥ 1, by `max_new_tokens` tokens, with a cache: [B, T + max_new_tokens].

        Runs in evaluation mode and in the model's own precision (`autocast`).

        Args:
            temperature: 0 takes the most likely token.
            top_p: sample among the fewest tokens that hold this much probability.
            seed: of the sampling.

        Raises:
            RequestError: an empty prompt, or an option out of bounds.
        """
        if tokens.shape[1] == 0:
            raise RequestError("generate: the prompt is empty; begin it with the tokenizer's start token")
        if not temperature >= 0 or not 0 < top_p <= 1 or max_new_tokens < 0:  # NaN is refused too
            raise RequestError(
                f"generate: temperature = {temperature} must be >= 0, top_p = {top_p} in (0, 1], "
                f"max_new_tokens = {max_new_tokens} >= 0"
            )
        generator = torch.Generator(tokens.device).manual_seed(seed)
        cache = Cache(self.config.num_layers, tokens.shape[1] + max_new_tokens)
        new = tokens
        with evaluating(self), self.autocast():
            for _ in range(max_new_tokens):
                logits = self(new, cache=cache)[:, -1]
                new = sample(logits, temperature, top_p, generator)
                tokens = torch.cat((tokens, new), dim=1)
        return tokens

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context of the model's own precision on the device it is on; none where its weights are not fp32."""
        weight = self.embedding.weight
        if weight.dtype != torch.float32:
            return contextlib.nullcontext()
        return autocast(self.precision, weight.device)

    def indexer_parameters(self) -> list[nn.Parameter]:
        """The parameters that the indexer's loss trains: indexers and learned controllers."""
        return [p for name, p in self.named_parameters() if ".indexer." in name or ".controller." in name]

    def update_references(self, uncertainty: Tensor) -> None:
        """Move the controllers' running means by [L, 2] sums and numbers gathered over one optimizer step."""
        for block, (total, count) in zip(self.blocks, uncertainty, strict=True):
            assert isinstance(block, Block)
            controller = block.attention.controller
            if isinstance(controller, Uncertainty) and count > 0:
                controller.update_reference(total / count)


def _replace(config: Any, path: tuple[str, ...], value: Any) -> Any:
    if len(path) > 1:
        value = _replace(getattr(config, path[0]), path[1:], value)
    return dataclasses.replace(config, **{path[0]: value})


def _by_layer(results: list[AttentionResult]) -> Sums:
    names = dict.fromkeys(name for result in results for name in result.statistics)
    missing = torch.tensor(math.nan)
    return {name: torch.stack([r.statistics.get(name, missing).double().cpu() for r in results]) for name in names}


def _stack_uncertainty(results: list[AttentionResult]) -> Tensor | None:
    known = [r.uncertainty for r in results if r.uncertainty is not None]
    if not known:
        return None
    return torch.stack([torch.zeros_like(known[0]) if r.uncertainty is None else r.uncertainty for r in results])
