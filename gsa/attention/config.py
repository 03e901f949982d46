"""Settings of one attention layer."""

import dataclasses
from typing import Literal

from gsa.attention.controller import ControllerConfig
from gsa.attention.gates import GateConfig
from gsa.attention.indexer import IndexerConfig
from gsa.attention.selection import SelectionConfig
from gsa.errors import ConfigError
from gsa.settings import setting

Stage = Literal["dense", "warmup", "sparse"]
BACKENDS = ("auto", "triton", "torch")


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
    backend: str = setting("auto", "triton kernels, torch, or auto: kernels where they run", choices=BACKENDS)
    query_chunk: int = setting(512, "queries handled at once by torch; bounds memory, changes no result", ge=1)

    def check(self, prefix: str) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{prefix}.num_kv_heads", self.num_kv_heads, f"must divide num_heads = {self.num_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"{prefix}.head_dim", self.head_dim, "must be even, for the rotary embedding")
        if "G5" in self.gates.places and self.gates.granularity == "head" and self.hidden_size % self.num_heads:
            allowed = f"G5 by head needs num_heads = {self.num_heads} to divide it"
            raise ConfigError(f"{prefix}.hidden_size", self.hidden_size, allowed)
