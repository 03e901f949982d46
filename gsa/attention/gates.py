"""Gates of arXiv 2505.06708: `act(W h + b) ⊙ x` at any subset of five places of an attention layer.

| place | what it multiplies |
|---|---|
| G1 | the attention output, before W_o |
| G2 | the values |
| G3 | the keys, before rope |
| G4 | the queries, before rope |
| G5 | the layer's output, after W_o |
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gsa.settings import setting

PLACES = ("G1", "G2", "G3", "G4", "G5")
GRANULARITIES = ("element", "head")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "silu": F.silu, "none": lambda x: x}


@dataclasses.dataclass
class GateConfig:
    places: list[str] = setting(lambda: ["G1", "G2"], "places that are gated", choices=PLACES)
    granularity: str = setting("element", "one gate value per channel or per head", choices=GRANULARITIES)
    activation: str = setting("sigmoid", "activation of the gate", choices=ACTIVATIONS)
    bias: float = setting(0.5, "initial bias")
    gain: float = setting(0.1, "gain of the initial weights (Xavier uniform)", ge=0)


class Gate(nn.Module):
    """One gate on a tensor of `heads` heads of `size` channels."""

    def __init__(self, config: GateConfig, hidden_size: int, heads: int, size: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.heads = heads
        self.projection = nn.Linear(hidden_size, heads * (size if config.granularity == "element" else 1))
        nn.init.xavier_uniform_(self.projection.weight, gain=config.gain)
        nn.init.constant_(self.projection.bias, config.bias)

    def forward(self, hidden: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gate `x` [B, T, heads, size] by hidden states [B, T, D]; also returns the gate's mean, detached."""
        gate = self.activation(self.projection(hidden)).unflatten(-1, (self.heads, -1))
        return gate * x, gate.detach().float().mean()
