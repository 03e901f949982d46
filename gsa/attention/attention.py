"""Gated Sparse Attention: one layer, from hidden states to hidden states.

- Dense, gated-only, sparse-only and gated sparse attention are configurations of this one module.
- What needs more than projections is a core's work: `chunked` in PyTorch or `fused` on Triton kernels.
- Three stages of training (GSA.md, "Training") see three attentions: `dense` attends to everything and leaves the
  indexer alone, `warmup` attends to everything and trains the indexer, `sparse` attends to the selection.
"""

import dataclasses
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gsa.attention.cache import LayerCache
from gsa.attention.chunked import attend_chunked
from gsa.attention.config import AttentionConfig, Stage
from gsa.attention.controller import KINDS, Controller
from gsa.attention.core import Asked, Attended, Parts, Projected
from gsa.attention.fused import attend_fused, problem
from gsa.attention.gates import PLACES, Gate
from gsa.attention.indexer import Indexer
from gsa.attention.rope import rope
from gsa.attention.statistics import Sums, add
from gsa.errors import ConfigError, RequestError

logger = logging.getLogger(__name__)

Core = Callable[[Parts, Projected, Asked], Attended]

_reported: set[str] = set()  # reasons for which `auto` took PyTorch on a GPU


@dataclasses.dataclass
class AttentionResult:
    """What one layer gives back."""

    output: Tensor  # [B, T, D]
    selection: Tensor | None  # [B, T, S] bool or words (`kernels.words`), kept only where a layer above reuses it
    indexer_loss: Tensor | None  # KL per query in nats, a mean; with the learned controller's own loss
    uncertainty: Tensor | None  # [2]: sum and number of the controller's statistic, for its running mean
    statistics: Sums  # only when measured


class GatedSparseAttention(nn.Module):
    """Attention of grouped heads over selected keys, with gates.

    Args:
        config: the layer's settings.
        layer: the layer's number, from 0; `selection.reuse` counts down from it.

    Raises:
        ConfigError: `selection.reuse` reaches below layer 0.
    """

    def __init__(self, config: AttentionConfig, layer: int = 0) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        hidden, heads, kv_heads, size = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.query = nn.Linear(hidden, heads * size, bias=False)
        self.key = nn.Linear(hidden, kv_heads * size, bias=False)
        self.value = nn.Linear(hidden, kv_heads * size, bias=False)
        self.out = nn.Linear(heads * size, hidden, bias=False)
        shapes = dict(zip(PLACES, [(heads, size), (kv_heads, size), (kv_heads, size), (heads, size)], strict=False))
        shapes["G5"] = (heads, hidden // heads) if config.gates.granularity == "head" else (1, hidden)
        self.gates = nn.ModuleDict({p: Gate(config.gates, hidden, *shapes[p]) for p in config.gates.places})
        self.watch: Callable[[Parts, Projected, Asked], None] | None = None  # sees what the core is given
        self.indexer: Indexer | None = None
        self.controller: Controller | None = None
        if config.sparse and config.selection.reuse > layer:
            raise ConfigError("selection.reuse", config.selection.reuse, f"must be <= the layer's number, {layer}")
        if config.sparse and not config.selection.reuse:
            self.indexer = Indexer(config.indexer, hidden, config.rope_theta)
            temperature = config.indexer.temperature
            self.controller = KINDS[config.controller.kind](config.controller, hidden, temperature)

    def forward(self, hidden: Tensor, starts: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D] to [B, T, D]; `starts` [B, T] are the first positions of the tokens' documents."""
        return self.attend(hidden, starts).output

    def attend(
        self,
        hidden: Tensor,
        starts: Tensor | None = None,
        *,
        stage: Stage = "sparse",
        cache: LayerCache | None = None,
        lower: Tensor | None = None,
        keep_selection: bool = False,
        indexer_loss: bool = False,
        measure: bool = False,
    ) -> AttentionResult:
        """The layer with all that training, decoding and diagnosis want to know.

        Args:
            hidden: [B, T, D].
            starts: [B, S], the first position of each token's document, those of cached tokens first;
                `None` for one document per row.
            stage: which attention (module docstring).
            cache: holds the S − T tokens before these, and takes these in.
            lower: the selection of the layer that `selection.reuse` names, as that layer returned it.
            keep_selection: return the selection.
            indexer_loss: return the indexer's loss, where the stage trains one.
            measure: return the sums of `gsa.attention.statistics`.
        """
        config = self.config
        batch, length, _ = hidden.shape
        positions = torch.arange(length, device=hidden.device)
        if cache is not None:
            positions = cache.positions(length, hidden.device)
        sparse = config.sparse and stage == "sparse"
        if sparse and config.selection.reuse and lower is None and length:
            raise RequestError(f"layer {self.layer} reuses a selection {config.selection.reuse} below: none was given")

        gate_means: dict[str, Tensor] = {}
        own_starts = positions.new_zeros(batch, length) if starts is None else starts.index_select(1, positions)
        place = positions - own_starts
        q = self._gate("G4", hidden, self.query(hidden).unflatten(-1, (-1, config.head_dim)), gate_means)
        k = self._gate("G3", hidden, self.key(hidden).unflatten(-1, (-1, config.head_dim)), gate_means)
        v = self._gate("G2", hidden, self.value(hidden).unflatten(-1, (-1, config.head_dim)), gate_means)
        q, k = rope(q, place, config.rope_theta), rope(k, place, config.rope_theta)
        index_queries = index_keys = None
        if self.indexer is not None and (stage != "dense" or cache is not None):
            index_queries, index_keys = self.indexer(hidden, place)
        if cache is not None:
            k, v = cache.extend("key", k), cache.extend("value", v)
            index_keys = None if index_keys is None else cache.extend("indexer_key", index_keys)

        packed, roomy = starts is not None, cache is not None and cache.room is not None
        if starts is None:
            starts = positions.new_zeros(batch, k.shape[1])
        tokens = Projected(hidden, q, k, v, index_queries, index_keys, starts, own_starts, positions, packed, roomy)
        asked = Asked(stage, lower, None if cache is None else cache.leader, keep_selection, indexer_loss, measure)
        core = self._core(tokens, asked)
        if cache is not None:
            cache.keep_leader(core.leader)
        attended = self._gate("G1", hidden, core.attended, gate_means)
        output = self.out(attended.flatten(2))
        if "G5" in self.gates:
            gate = self.gates["G5"]
            output = self._gate("G5", hidden, output.unflatten(-1, (gate.heads, -1)), gate_means).flatten(2)
        if measure:
            add(core.sums, {f"gate_{place}": mean * batch * length for place, mean in gate_means.items()})
            core.sums["tokens"] = torch.tensor(batch * length)
        return AttentionResult(output, core.selection, core.indexer_loss, core.uncertainty, core.sums)

    def _core(self, tokens: Projected, asked: Asked) -> Attended:
        parts = Parts(self.config, self.indexer, self.controller, self.training)
        if self.watch is not None:
            self.watch(parts, tokens, asked)
        return self.choose_core(parts, tokens)(parts, tokens, asked)

    def choose_core(self, parts: Parts, tokens: Projected) -> Core:
        """The core that `attention.backend` means for these tokens: `attend_chunked` or `attend_fused`.

        Where `auto` takes PyTorch on a GPU, it says why: once per process and reason.

        Raises:
            RequestError: `backend` is `triton`, and the kernels cannot run this.
        """
        backend = self.config.backend
        if backend == "torch" or (backend == "auto" and not tokens.q.is_cuda):
            return attend_chunked
        reason = problem(parts, tokens)
        if reason is None:
            return attend_fused
        if backend == "triton":
            raise RequestError(f"attention.backend = triton: the kernels cannot run layer {self.layer}: {reason}")
        if not torch.compiler.is_compiling():  # it would cut the graph; the first evaluation, uncompiled, reports it
            _report_fallback(reason, self.layer)
        return attend_chunked

    def _gate(self, place: str, hidden: Tensor, x: Tensor, means: dict[str, Tensor]) -> Tensor:
        if place not in self.gates:
            return x
        gated: Tensor
        gated, means[place] = self.gates[place](hidden, x)
        return gated


def _report_fallback(reason: str, layer: int) -> None:
    if reason not in _reported:
        _reported.add(reason)
        logger.warning(
            "attention.backend = auto: layer %d attends in PyTorch, not on the kernels: %s; "
            "attention.backend = torch chooses this, triton refuses it",
            layer,
            reason,
        )
