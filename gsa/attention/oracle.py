"""What a layer of gated sparse attention computes: one query after another, one key after another, in fp64.

This is the definition (GSA.md, "The operation, per layer"); nothing here is meant to be fast. It reads a layer's
parameters, buffers and settings and calls none of its code, so that the two can be held against each other:

1. queries, keys and values are projected, gated (G4, G3, G2), and queries and keys are then rotated;
2. the indexer scores the keys that a query may choose from: every visible one, or the tokens of the best blocks;
3. the controller says how many of them the query keeps;
4. the best are kept, forced ones first and ties to the earlier, and windows of queries share their first one's;
5. each head attends to what was kept, gated (G1) before W_o and (G5) after it.

Everything is counted from the start of the query's own document. Outputs and losses can be differentiated.
"""

import dataclasses
import math

import torch
from torch import Tensor

from gsa.attention.attention import GatedSparseAttention
from gsa.attention.config import AttentionConfig, Stage


@dataclasses.dataclass
class OracleResult:
    output: Tensor  # [B, T, D]
    scores: Tensor  # [B, T, T], −inf where a key was not scored
    k: Tensor  # [B, T], the number of keys of the query's own selection, before windows share it
    selection: Tensor  # [B, T, T] bool, the keys that are attended to
    indexer_loss: Tensor | None  # nats, mean over the queries, the learned controller's own loss included


def oracle_attention(
    layer: GatedSparseAttention,
    hidden: Tensor,
    starts: Tensor | None = None,
    stage: Stage = "sparse",
    lower: Tensor | None = None,
) -> OracleResult:
    """The attention of `layer` on hidden states [B, T, D].

    Args:
        layer: gives settings, parameters and buffers.
        hidden: [B, T, D].
        starts: [B, T], the first key that each query may see, `None` for 0; a query that sees none gives 0 and no loss.
        stage: `dense` and `warmup` attend to every visible key, `sparse` to the selected ones;
            `warmup` and `sparse` have an indexer loss.
        lower: [B, T, T] bool, the selection that a layer with `selection.reuse` takes over.
    """
    batch, length, _ = hidden.shape
    state = {name: t.double() for name, t in [*layer.named_parameters(), *layer.named_buffers()]}
    output = torch.zeros(hidden.shape, dtype=torch.float64)
    scores = torch.full((batch, length, length), -math.inf, dtype=torch.float64)
    k = torch.zeros(batch, length, dtype=torch.long)
    selection = torch.zeros(batch, length, length, dtype=torch.bool)
    losses: list[Tensor] = []
    for b in range(batch):
        row = _Row(layer.config, state, hidden[b].double(), [0] * length if starts is None else starts[b].tolist())
        own: list[list[int]] = []  # each query's own selection
        for t in range(length):
            chosen = candidates = row.visible(t)
            if not chosen:  # padding before the row's first token
                own.append([])
                continue
            if row.config.sparse and stage == "sparse":
                if row.config.selection.reuse:
                    assert lower is not None
                    own.append(lower[b, t].nonzero().flatten().tolist())
                else:
                    candidates = row.candidates(t)
                    own.append(row.select(t, candidates))
                leader = t - (t - row.starts[t]) % row.config.selection.share
                chosen = sorted({*own[leader], *range(leader, t + 1)}) if row.config.selection.share > 1 else own[t]
                k[b, t] = len(own[t])
            selection[b, t, chosen] = True
            output[b, t], attention = row.attend(t, chosen)
            if "indexer.key.weight" in state and stage != "dense":
                scores[b, t, candidates] = row.scores(t, candidates).detach()
                losses.append(row.indexer_loss(t, chosen, attention) + row.controller_loss(t, candidates))
    loss = torch.stack(losses).mean() if losses else None
    return OracleResult(output, scores, k, selection, loss)


class _Row:
    """One row of the batch."""

    def __init__(self, config: AttentionConfig, state: dict[str, Tensor], hidden: Tensor, starts: list[int]) -> None:
        self.config, self.state, self.hidden, self.starts = config, state, hidden, starts
        heads, kv_heads = config.num_heads, config.num_kv_heads
        tokens = range(len(starts))
        self.q = [self._rotate(self._gate("G4", t, self._heads("query", t, heads)), t) for t in tokens]
        self.k = [self._rotate(self._gate("G3", t, self._heads("key", t, kv_heads)), t) for t in tokens]
        self.v = [self._gate("G2", t, self._heads("value", t, kv_heads)) for t in tokens]

    def visible(self, t: int) -> list[int]:
        return list(range(self.starts[t], t + 1))

    def forced(self, t: int) -> list[int]:
        selection, start = self.config.selection, self.starts[t]
        return [s for s in self.visible(t) if s > t - selection.local_window or s < start + selection.sink_tokens]

    def candidates(self, t: int) -> list[int]:
        """The keys that are scored exactly."""
        coarse, start = self.config.selection.coarse, self.starts[t]
        if coarse is None:
            return self.visible(t)
        own = (t - start) // coarse.block
        tokens = {i: range(start + i * coarse.block, start + (i + 1) * coarse.block) for i in range(own)}
        means = {i: torch.stack([self._index_key(s) for s in tokens[i]]).mean(0) for i in tokens}
        best = sorted(means, key=lambda i: (-float(self._score(t, means[i]).detach()), i))
        best = best[: math.ceil(coarse.candidates * self._nominal_k(t) / coarse.block)]
        kept = {own, own - 1, *best}
        return [s for s in self.visible(t) if (s - start) // coarse.block in kept or s in self.forced(t)]

    def select(self, t: int, candidates: list[int]) -> list[int]:
        """Step 4: the k_t best candidates, forced ones before all others, the earlier of equals."""
        forced, scores = set(self.forced(t)), dict(zip(candidates, self.scores(t, candidates).tolist(), strict=True))
        ranked = sorted(candidates, key=lambda s: (s not in forced, -scores[s], s))
        return sorted(ranked[: self._keys_kept(t, candidates)])

    def scores(self, t: int, candidates: list[int]) -> Tensor:
        """Step 2: I[t, s] for each candidate s."""
        return torch.stack([self._score(t, self._index_key(s)) for s in candidates])

    def attend(self, t: int, chosen: list[int]) -> tuple[Tensor, Tensor]:
        """Step 5: the output [D] and, over the chosen keys, the attention's mean over the heads."""
        heads, group = self.config.num_heads, self.config.num_heads // self.config.num_kv_heads
        outputs, attentions = [], []
        for h in range(heads):
            logits = torch.stack([self.q[t][h] @ self.k[s][h // group] for s in chosen])
            attention = (logits / math.sqrt(self.config.head_dim)).softmax(0)
            outputs.append(sum(a * self.v[s][h // group] for a, s in zip(attention, chosen, strict=True)))
            attentions.append(attention)
        gated = self._gate("G1", t, torch.stack([torch.as_tensor(o) for o in outputs]))
        output = self.state["out.weight"] @ gated.flatten()
        groups = heads if self.config.gates.granularity == "head" else 1
        return self._gate("G5", t, output.view(groups, -1)).flatten(), torch.stack(attentions).mean(0)

    def indexer_loss(self, t: int, support: list[int], attention: Tensor) -> Tensor:
        """KL(attention ‖ softmax(τ·I)) over the support; the attention is a fixed target."""
        target = attention.detach()
        log_p = (self.config.indexer.temperature * self.scores(t, support)).log_softmax(0)
        return (target * (target.log() - log_p)).sum()

    def controller_loss(self, t: int, candidates: list[int]) -> Tensor:
        """`learned`: squared error of log k against the number of keys that hold `target_mass` of softmax(τ·I)."""
        config = self.config.controller
        if config.kind != "learned":
            return torch.zeros((), dtype=torch.float64)
        mass, needed = 0.0, 0
        for p in sorted(self._distribution(t, candidates).tolist(), reverse=True):
            mass, needed = mass + p, needed + 1
            if mass >= config.target_mass:
                break
        return (self._log_k(t) - math.log(min(max(needed, config.k_min), config.k_max))) ** 2

    def _keys_kept(self, t: int, candidates: list[int]) -> int:
        """Step 3: k_t."""
        config, forced = self.config.controller, self.forced(t)
        scores = self.scores(t, candidates).detach()
        if config.kind in ("fixed", "ratio"):
            wanted = float(self._nominal_k(t))
        elif config.kind == "threshold":
            wanted = sum(float(i) >= config.threshold or s in forced for s, i in zip(candidates, scores, strict=True))
        elif config.kind == "learned":
            wanted = float(self._log_k(t).detach().exp())
        else:
            uncertainty = float(scores.var(correction=0))
            if config.kind == "entropy":
                uncertainty = -sum(p * math.log(p) for p in self._distribution(t, candidates).tolist() if p)
            relative = uncertainty / max(float(self.state["controller.reference"]), 1e-12)
            wanted = config.k * (0.5 + 1 / (1 + config.temperature * relative))
        clipped = min(max(math.ceil(wanted), config.k_min), config.k_max)
        return min(max(clipped, len(forced)), len(candidates))

    def _nominal_k(self, t: int) -> int:
        """The k by which candidate blocks are counted."""
        config = self.config.controller
        if config.kind == "ratio":
            return min(max(math.ceil(config.ratio * len(self.visible(t)) - 1e-9), config.k_min), config.k_max)
        return config.k_max if config.kind in ("threshold", "learned") else config.k

    def _log_k(self, t: int) -> Tensor:
        low, high = math.log(self.config.controller.k_min), math.log(self.config.controller.k_max)
        return low + (high - low) * self._affine("controller.head", self.hidden[t].detach()).sigmoid().squeeze()

    def _distribution(self, t: int, candidates: list[int]) -> Tensor:
        return (self.config.indexer.temperature * self.scores(t, candidates).detach()).softmax(0)

    def _index_key(self, s: int) -> Tensor:
        key = self.state["indexer.key.weight"] @ self.hidden[s].detach()
        return self._rotate(key, s) if self.config.indexer.rope else key

    def _score(self, t: int, key: Tensor) -> Tensor:
        """I of query t and one key [d_I]: Σ_j w_j · σ(q_j·k/√d_I + b_j), and the other two kinds."""
        config, hidden = self.config.indexer, self.hidden[t].detach()
        queries = (self.state["indexer.query.weight"] @ hidden).view(config.num_heads, config.head_dim)
        total = torch.zeros((), dtype=torch.float64)
        for j in range(config.num_heads):
            query = self._rotate(queries[j], t) if config.rope else queries[j]
            product = query @ key / math.sqrt(config.head_dim)
            each = product.relu() if config.kind == "relu" else (product + self.state["indexer.bias"][j]).sigmoid()
            if config.kind != "sigmoid":
                each = each * self._affine("indexer.head_weight", hidden)[j].sigmoid()
            total = total + each
        return total

    def _heads(self, name: str, t: int, heads: int) -> Tensor:
        return (self.state[f"{name}.weight"] @ self.hidden[t]).view(heads, self.config.head_dim)

    def _affine(self, name: str, x: Tensor) -> Tensor:
        return self.state[f"{name}.weight"] @ x + self.state[f"{name}.bias"]

    def _gate(self, place: str, t: int, x: Tensor) -> Tensor:
        """`act(W h + b) ⊙ x`, x [heads, size]: a value per head or per element."""
        if place not in self.config.gates.places:
            return x
        gate = self._affine(f"gates.{place}.projection", self.hidden[t]).view(len(x), -1)
        if self.config.gates.activation == "none":
            return gate * x
        return gate.sigmoid() * (gate if self.config.gates.activation == "silu" else 1) * x

    def _rotate(self, x: Tensor, t: int) -> Tensor:
        """Rope: channels i and i + d/2 are one complex number, turned by (place in the document)·theta^(−2i/d)."""
        half = x.shape[-1] // 2
        angles = [(t - self.starts[t]) * self.config.rope_theta ** (-i / half) for i in range(half)]
        turn = torch.polar(torch.ones(half, dtype=torch.float64), torch.tensor(angles, dtype=torch.float64))
        turned = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((turned.real, turned.imag), -1)
