"""How fast each layer of a trained model attends, on a text and with the selections that it makes there."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gsa.attention.attention import GatedSparseAttention
from gsa.attention.core import Asked, Parts, Projected
from gsa.attention.fused import attend_fused, problem
from gsa.errors import RequestError
from gsa.model import GSAForCausalLM
from kernels.bench import Row, dense_times, milliseconds, overlap


def layer_rows(model: GSAForCausalLM, tokens: Tensor) -> Iterator[Row]:
    """A row as of `kernels.bench` for each layer, in bf16, on tokens [B, T] of one document a row.

    Raises:
        RequestError: the kernels cannot run a layer.
    """
    for layer, (parts, projected, asked) in enumerate(core_inputs(model, tokens)):
        reason = problem(parts, projected)
        if reason is not None:
            raise RequestError(f"layer {layer}: {reason}")
        yield _row(layer, parts, projected, asked)


def core_inputs(model: GSAForCausalLM, tokens: Tensor) -> list[tuple[Parts, Projected, Asked]]:
    """What the core of each layer is given for tokens [B, T], in bf16 on a GPU."""
    seen: list[tuple[Parts, Projected, Asked]] = []
    watch_cores(model, tokens, lambda _, *given: seen.append(given))
    return seen


def watch_cores(model: GSAForCausalLM, tokens: Tensor, see: Callable[[int, Parts, Projected, Asked], None]) -> None:
    """Show what `core_inputs` gives to `see` with the layer's number, layer by layer: none of it need be kept."""
    layers = [module for module in model.modules() if isinstance(module, GatedSparseAttention)]
    try:
        for layer in layers:
            layer.watch = functools.partial(see, layer.layer)
        with torch.no_grad(), torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
            model.run(tokens)
    finally:
        for layer in layers:
            layer.watch = None


@torch.no_grad()
def _row(layer: int, parts: Parts, tokens: Projected, asked: Asked) -> Row:
    config = parts.config
    ours = milliseconds(lambda: attend_fused(parts, tokens, asked))
    dense = dense_times(tokens.q, tokens.k, tokens.v, milliseconds)
    row: Row = {
        "operation": f"layer {layer}",
        "T": tokens.q.shape[1],
        "batch": tokens.q.shape[0],
        "heads": f"{config.num_heads}/{config.num_kv_heads}x{config.head_dim}",
        "indexer": f"{config.indexer.num_heads}x{config.indexer.head_dim}" if config.sparse else "none",
        "ours_ms": ours,
        "dense_ms": dense,
        "speedup": min(dense.values()) / ours,
    }
    if config.sparse:
        words = attend_fused(parts, tokens, asked._replace(keep_selection=True)).selection
        assert words is not None
        row["k"] = overlap(words, 1, tile=1)
        row["u32"] = overlap(words, 1) / max(row["k"], 1)
    return row
