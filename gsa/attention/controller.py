"""The adaptive sparsity controller: how many keys k_t each query keeps.

Every kind looks only at its own query's scores of visible keys, so nothing leaks from later
positions or from other sequences. The reference against which `variance` and `entropy` compare
is a buffer: it moves only when the training loop calls `update_reference`, between steps.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gsa.errors import ConfigError
from gsa.settings import setting


class Seen(NamedTuple):
    """What C queries know when they choose how many of S keys to keep."""

    scores: Tensor  # [B, C, S] indexer scores
    visible: Tensor  # [B, C, S] bool: the keys that were scored
    available: Tensor  # [B, C] integers: how many keys the query may see, scored or not
    forced: Tensor  # [B, C, S] bool: the keys that are kept in any case
    hidden: Tensor  # [B, C, D] the queries' own hidden states


class Controller(nn.Module, ABC):
    """Chooses k_t; `forward` clips what a kind wants to [k_min, k_max] and to the visible keys."""

    def __init__(self, config: "ControllerConfig", hidden_size: int, temperature: float) -> None:
        super().__init__()
        self.config, self.temperature = config, temperature

    def wanted(self, seen: Seen) -> Tensor:
        """The number of keys wanted, [B, C], before clipping."""
        wanted = self.ahead(seen.available, seen.hidden)
        assert wanted is not None, "a controller knows the number ahead of the scores or overrides this"
        return wanted

    def ahead(self, available: Tensor, hidden: Tensor) -> Tensor | None:
        """The number wanted where no score is needed to know it, [B, C] integers, else `None`.

        Args:
            available: [B, C], how many keys each query may see.
            hidden: [B, C, D], the queries' hidden states.
        """
        return None

    def nominal(self, available: Tensor) -> Tensor:
        """The k by which two-level selection sizes its candidates, [B, C], known before any score is."""
        return torch.full_like(available, self.config.k)

    def uncertainty(self, seen: Seen) -> Tensor | None:
        """The statistic [B, C] whose running mean is the reference, `None` for kinds without one."""
        return None

    def loss(self, seen: Seen) -> Tensor | None:
        """A training loss [B, C] of the controller's own parameters, `None` for kinds without any."""
        return None

    def forward(self, seen: Seen) -> Tensor:
        """k_t as integers, [B, C]."""
        wanted = self.wanted(seen).ceil().long().clamp(self.config.k_min, self.config.k_max)
        wanted = torch.maximum(wanted, seen.forced.sum(-1))
        return torch.minimum(wanted, seen.visible.sum(-1))


class Fixed(Controller):
    """k_t = k."""

    def ahead(self, available: Tensor, hidden: Tensor) -> Tensor:
        return torch.full_like(available, self.config.k)


class Ratio(Controller):
    """k_t = ⌈ratio · (t + 1)⌉, t counted within the document."""

    def ahead(self, available: Tensor, hidden: Tensor) -> Tensor:
        return self.nominal(available)

    def nominal(self, available: Tensor) -> Tensor:
        # fp64, and less than an ulp's worth of slack: 0.1 · 30 is 3, not the 3.0000000000000004 that rounds up to 4
        wanted = (available.double() * self.config.ratio - 1e-9).ceil().long()
        return wanted.clamp(self.config.k_min, self.config.k_max)


class Threshold(Controller):
    """Every key whose score reaches θ."""

    def wanted(self, seen: Seen) -> Tensor:
        return (((seen.scores >= self.config.threshold) & seen.visible) | seen.forced).sum(-1).to(seen.scores.dtype)

    def nominal(self, available: Tensor) -> Tensor:
        return torch.full_like(available, self.config.k_max)


class Uncertainty(Controller):
    """k_t = k · (½ + 1 / (1 + temperature · x_t / reference)), x_t a statistic of the query's own scores."""

    reference: Tensor
    updates: Tensor

    def __init__(self, config: "ControllerConfig", hidden_size: int, temperature: float) -> None:
        super().__init__(config, hidden_size, temperature)
        self.register_buffer("reference", torch.ones(()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def wanted(self, seen: Seen) -> Tensor:
        statistic = self._statistic(seen)
        relative = statistic / self.reference.to(statistic.dtype).clamp_min(1e-12)
        return self.config.k * (0.5 + 1 / (1 + self.config.temperature * relative))

    def uncertainty(self, seen: Seen) -> Tensor:
        return self._statistic(seen)

    @abstractmethod
    def _statistic(self, seen: Seen) -> Tensor: ...

    @torch.no_grad()
    def update_reference(self, mean: Tensor) -> None:
        """Move the reference toward `mean`, the statistic's mean over one optimizer step's tokens."""
        weight = 1.0 if not self.updates else 1 - self.config.momentum
        self.reference.lerp_(mean.to(self.reference), weight)
        self.updates += 1


class Variance(Uncertainty):
    """x_t = Var_{s ≤ t} I[t, s]: spread-out scores mean a sure query, which keeps fewer keys."""

    def _statistic(self, seen: Seen) -> Tensor:
        scores = seen.scores.double().masked_fill(~seen.visible, 0)
        count = seen.visible.sum(-1).clamp_min(1)
        mean = scores.sum(-1) / count
        return ((scores - mean[..., None]).square() * seen.visible).sum(-1) / count


class Entropy(Uncertainty):
    """x_t = the entropy of softmax(τ · I[t, s ≤ t]), in nats."""

    def _statistic(self, seen: Seen) -> Tensor:
        logits = (self.temperature * seen.scores.double()).masked_fill(~seen.visible, torch.finfo(torch.double).min)
        log_p = logits.log_softmax(-1)
        return -(log_p.exp() * log_p.masked_fill(~seen.visible, 0)).sum(-1)


class Learned(Controller):
    """A linear head on the query's hidden state, on a logarithmic scale from k_min to k_max.

    Selection passes no gradient, so the head is trained as the indexer is, beside it: it predicts the
    number of keys that hold `target_mass` of softmax(τ · I[t, :]).
    """

    def __init__(self, config: "ControllerConfig", hidden_size: int, temperature: float) -> None:
        super().__init__(config, hidden_size, temperature)
        self.head = nn.Linear(hidden_size, 1)

    def ahead(self, available: Tensor, hidden: Tensor) -> Tensor:
        return self._log_k(hidden).exp().ceil().long()

    def nominal(self, available: Tensor) -> Tensor:
        return torch.full_like(available, self.config.k_max)

    def loss(self, seen: Seen) -> Tensor:
        logits = self.temperature * seen.scores.detach()
        logits = logits.masked_fill(~seen.visible, torch.finfo(logits.dtype).min)
        mass = logits.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
        needed = 1 + (mass < self.config.target_mass).sum(-1)
        target = needed.clamp(self.config.k_min, self.config.k_max).to(logits.dtype).log()
        loss: Tensor = (self._log_k(seen.hidden) - target).square() * (seen.available > 0)
        return loss

    def _log_k(self, hidden: Tensor) -> Tensor:
        low, high = math.log(self.config.k_min), math.log(self.config.k_max)
        position: Tensor = self.head(hidden.detach()).squeeze(-1).sigmoid()
        return low + (high - low) * position


KINDS: dict[str, type[Controller]] = {
    "fixed": Fixed,
    "ratio": Ratio,
    "threshold": Threshold,
    "variance": Variance,
    "entropy": Entropy,
    "learned": Learned,
}


@dataclasses.dataclass
class ControllerConfig:
    kind: str = setting("variance", "how k_t is chosen", choices=KINDS)
    k: int = setting(2048, "keys a query keeps (fixed); the base of variance and entropy", ge=1)
    k_min: int = setting(256, "least number of keys a query keeps, as far as there are as many", ge=1)
    k_max: int = setting(4096, "largest number of keys a query keeps", ge=1)
    ratio: float = setting(0.1, "share of the visible keys that is kept (ratio)", gt=0, le=1)
    threshold: float = setting(1.0, "score from which a key is kept (threshold)")
    temperature: float = setting(1.0, "weight of the uncertainty (variance, entropy)", ge=0)
    momentum: float = setting(0.99, "of the running mean of the uncertainty, per optimizer step", ge=0, lt=1)
    target_mass: float = setting(0.9, "share of the indexer's distribution to be held (learned)", gt=0, lt=1)

    def check(self, prefix: str) -> None:
        if self.k_min > self.k_max:
            raise ConfigError(f"{prefix}.k_min", self.k_min, f"must be <= {prefix}.k_max, which is {self.k_max}")
        if self.kind in ("fixed", "variance", "entropy") and not self.k_min <= self.k <= self.k_max:
            raise ConfigError(f"{prefix}.k", self.k, f"must be from k_min to k_max, {self.k_min} to {self.k_max}")
