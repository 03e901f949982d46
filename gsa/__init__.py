"""Gated Sparse Attention: the model, its training and its evaluation. Knows nothing of Ray."""

import importlib
from typing import TYPE_CHECKING, Any

from gsa import account

if TYPE_CHECKING:
    from gsa.attention.attention import GatedSparseAttention
    from gsa.config import load_config
    from gsa.model import GSAForCausalLM
    from gsa.training.checkpoint import load_checkpoint

__all__ = ["GSAForCausalLM", "GatedSparseAttention", "load_checkpoint", "load_config"]

account.ensure()  # before anything is imported that asks for a user's name or home

_HOMES = {
    "GSAForCausalLM": "gsa.model",
    "GatedSparseAttention": "gsa.attention.attention",
    "load_checkpoint": "gsa.training.checkpoint",
    "load_config": "gsa.config",
}


def __getattr__(name: str) -> Any:
    # On first use: `gsa --help` and every Ray worker import this package, and few of them need torch at once.
    if name not in _HOMES:
        raise AttributeError(f"module 'gsa' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
