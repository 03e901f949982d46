"""Gated Sparse Attention: one layer, from hidden states to hidden states.

- Dense, gated-only, sparse-only and gated sparse attention are configurations of this one module.
- Queries are handled in chunks of `query_chunk`: no [T, T, d] or [B, T, T, H] tensor ever exists.
- Three stages of training (GSA.md, "Training") see three attentions: `dense` attends to everything and leaves the
  indexer alone, `warmup` attends to everything and trains the indexer, `sparse` attends to the selection.
"""

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gsa.attention.cache import LayerCache
from gsa.attention.controller import KINDS, Controller, ControllerConfig, Seen
from gsa.attention.gates import PLACES, Gate, GateConfig
from gsa.attention.indexer import Indexer, IndexerConfig, IndexerQueries
from gsa.attention.rope import rope
from gsa.attention.selection import Blocks, Queries, SelectionConfig, share_windows, top_k
from gsa.attention.statistics import Sums, add, mean_attention, selection_sums
from gsa.errors import ConfigError, RequestError
from gsa.settings import setting

Stage = Literal["dense", "warmup", "sparse"]


@dataclasses.dataclass
class AttentionConfig:
    hidden_size: int = setting(256, "width of the residual stream, D", ge=1)
    num_heads: int = setting(4, "query heads, H", ge=1)
    num_kv_heads: int = setting(4, "key/value heads, K; divides num_heads", ge=1)
    head_dim: int = setting(64, "size of a head, d; even", ge=2)
    rope_theta: float = setting(10_000.0, "base of the rotary embedding", gt=0)
    sparse: bool = setting(True, "select keys; false is dense attention without an indexer")
    gates: GateConfig = setting(GateConfig, "gates")
    indexer: IndexerConfig = setting(IndexerConfig, "indexer")
    controller: ControllerConfig = setting(ControllerConfig, "adaptive sparsity controller")
    selection: SelectionConfig = setting(SelectionConfig, "what is added to and shared between selections")
    query_chunk: int = setting(512, "queries handled at once; bounds memory, changes no result", ge=1)

    def check(self, prefix: str) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{prefix}.num_kv_heads", self.num_kv_heads, f"must divide num_heads = {self.num_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"{prefix}.head_dim", self.head_dim, "must be even, for the rotary embedding")
        if "G5" in self.gates.places and self.gates.granularity == "head" and self.hidden_size % self.num_heads:
            allowed = f"G5 by head needs num_heads = {self.num_heads} to divide it"
            raise ConfigError(f"{prefix}.hidden_size", self.hidden_size, allowed)


@dataclasses.dataclass
class AttentionResult:
    """What one layer gives back."""

    output: Tensor  # [B, T, D]
    selection: Tensor | None  # [B, T, S] bool, kept only where a layer above reuses it
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
            lower: [B, T, S] bool, the selection of the layer that `selection.reuse` names.
            keep_selection: return the selection.
            indexer_loss: return the indexer's loss, where the stage trains one.
            measure: return the sums of `gsa.attention.statistics`.
        """
        config = self.config
        batch, length, _ = hidden.shape
        past = 0
        if cache is not None and "key" in cache.tensors:
            past = cache.tensors["key"].shape[1]
        if starts is None:
            starts = torch.zeros(batch, past + length, dtype=torch.long, device=hidden.device)
        sparse = config.sparse and stage == "sparse"
        if sparse and config.selection.reuse and lower is None and length:
            raise RequestError(f"layer {self.layer} reuses a selection {config.selection.reuse} below: none was given")

        gate_means: dict[str, Tensor] = {}
        positions = torch.arange(past, past + length, device=hidden.device)
        place = positions - starts[:, past:]
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

        group = config.num_heads // config.num_kv_heads
        keys = k.repeat_interleave(group, 2).transpose(1, 2)  # [B, H, S, d]
        values = v.repeat_interleave(group, 2).transpose(1, 2)
        leader = None if cache is None else cache.leader
        blocks = None
        if sparse and index_keys is not None and config.selection.coarse is not None:
            blocks = Blocks.pool(index_keys.detach(), starts, config.selection.coarse.block) if length else None
        outputs, selections, losses, uncertainties = [], [], [], []
        num_queries = torch.zeros((), dtype=torch.long, device=hidden.device)  # those that see any key
        sums: Sums = {}
        for first in range(0, length, config.query_chunk):
            rows = slice(first, min(first + config.query_chunk, length))
            queries = Queries(positions[rows], starts[:, past:][:, rows])
            visible = queries.visible(keys.shape[2])
            selected = visible
            seen = None
            if index_queries is not None and index_keys is not None and (sparse or indexer_loss):
                seen = self._look(index_queries.rows(rows), index_keys, queries, blocks, hidden[:, rows])
            if sparse:
                if seen is None:
                    assert lower is not None  # checked above
                    selected = lower[:, rows]
                else:
                    selected = self._select(seen)
                if config.selection.share > 1:
                    selected, leader = share_windows(selected, leader, queries, config.selection.share)
            chunk_q = q[:, rows].transpose(1, 2)  # [B, H, C, d]
            sees_any = visible.any(-1)  # [B, C]; padding before a row's first token sees nothing
            mask = (selected | ~sees_any[..., None])[:, None]  # a softmax of nothing would be NaN
            attended = F.scaled_dot_product_attention(chunk_q, keys, values, attn_mask=mask)
            outputs.append(attended * sees_any[:, None, :, None])
            num_queries = num_queries + sees_any.sum()
            if keep_selection and sparse:
                selections.append(selected)
            if indexer_loss and stage != "dense" and seen and index_queries is not None and index_keys is not None:
                target = mean_attention(chunk_q, keys, selected)
                losses.append(self._indexer_loss(index_queries.rows(rows), index_keys, seen, target, selected))
            if seen is not None and self.training:
                uncertainties.append(self._uncertainty(seen))
            if measure:
                add(sums, selection_sums(chunk_q, keys, queries, visible, selected))
        if cache is not None:
            cache.leader = leader

        attended = torch.cat(outputs, 2).transpose(1, 2) if outputs else torch.zeros_like(q)  # [B, T, H, d]
        attended = self._gate("G1", hidden, attended, gate_means)
        output = self.out(attended.flatten(2))
        if "G5" in self.gates:
            gate = self.gates["G5"]
            output = self._gate("G5", hidden, output.unflatten(-1, (gate.heads, -1)), gate_means).flatten(2)
        if measure:
            add(sums, {f"gate_{place}": mean * batch * length for place, mean in gate_means.items()})
            sums["tokens"] = torch.tensor(batch * length)
        known = [u for u in uncertainties if u is not None]
        return AttentionResult(
            output=output,
            selection=torch.cat(selections, 1) if selections else None,
            indexer_loss=torch.stack(losses).sum() / num_queries.clamp_min(1) if losses else None,
            uncertainty=torch.stack(known).sum(0) if known else None,
            statistics=sums,
        )

    def _gate(self, place: str, hidden: Tensor, x: Tensor, means: dict[str, Tensor]) -> Tensor:
        if place not in self.gates:
            return x
        gated: Tensor
        gated, means[place] = self.gates[place](hidden, x)
        return gated

    @torch.no_grad()
    def _look(
        self, index_queries: IndexerQueries, index_keys: Tensor, queries: Queries, blocks: Blocks | None, hidden: Tensor
    ) -> Seen:
        """Score the keys: every visible one, or with `coarse` the candidates among them."""
        assert self.indexer is not None
        assert self.controller is not None
        count = index_keys.shape[1]
        visible, forced = queries.visible(count), queries.forced(self.config.selection, count)
        available = visible.sum(-1)
        if blocks is not None:
            coarse = self.config.selection.coarse
            assert coarse is not None
            wanted = self.controller.nominal(available) * coarse.candidates
            kept = (wanted + coarse.block - 1) // coarse.block
            block_scores = self.indexer.scores(index_queries, blocks.pooled)
            visible = visible & (blocks.candidates(block_scores, queries, kept) | forced)
        return Seen(self.indexer.scores(index_queries, index_keys), visible, available, forced, hidden)

    @torch.no_grad()
    def _select(self, seen: Seen) -> Tensor:
        assert self.controller is not None
        return top_k(seen.scores, seen.visible, seen.forced, self.controller(seen))

    def _indexer_loss(
        self, index_queries: IndexerQueries, index_keys: Tensor, seen: Seen, target: Tensor, support: Tensor
    ) -> Tensor:
        """Σ over the chunk's queries of KL(target ‖ softmax(τ·I)) on the support, and the controller's loss."""
        assert self.indexer is not None
        assert self.controller is not None
        indexer = self.indexer

        def divergence(q: Tensor, weight: Tensor | None, keys: Tensor) -> Tensor:
            scores = indexer.scores(IndexerQueries(q, weight), keys)
            logits = (indexer.config.temperature * scores).masked_fill(~support, torch.finfo(scores.dtype).min)
            log_p = logits.log_softmax(-1).masked_fill(~support, 0)
            return (target * (target.clamp_min(1e-30).log() - log_p)).sum()

        # Scores of every chunk, by head, would add up to [B, T, H_I, T] until the backward pass: make them anew there.
        loss: Tensor = checkpoint(
            divergence, index_queries.q, index_queries.weight, index_keys, use_reentrant=False, preserve_rng_state=False
        )
        own = self.controller.loss(seen)
        return loss if own is None else loss + own.sum()

    @torch.no_grad()
    def _uncertainty(self, seen: Seen) -> Tensor | None:
        assert self.controller is not None
        statistic = self.controller.uncertainty(seen)
        if statistic is None:
            return None
        return torch.stack((statistic.sum(), seen.available.count_nonzero().to(statistic)))
