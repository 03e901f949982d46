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
from gsa.training.precision import autocast
from kernels.bench import Row, dense_times, milliseconds, overlap


def layer_rows(model: GSAForCausalLM, tokens: Tensor) -> Iterator[Row]:
    """A row as of `kernels.bench` for each layer, in bf16, on tokens [B, T] of one document a row.

    Raises:
        RequestError: the kernels cannot run a layer.
    """
    for layer, (parts, projected, asked) in enumerate(core_inputs(model, tokens, timed=True)):
        reason = problem(parts, projected)
        if reason is not None:
            raise RequestError(f"layer {layer}: {reason}")
        yield _row(layer, parts, projected, asked)


def core_inputs(model: GSAForCausalLM, tokens: Tensor, timed: bool = False) -> list[tuple[Parts, Projected, Asked]]:
    """What the core of each layer is given for tokens [B, T]; `timed` as in `watch_cores`."""
    seen: list[tuple[Parts, Projected, Asked]] = []
    watch_cores(model, tokens, lambda _, *given: seen.append(given), timed)
    return seen


def watch_cores(
    model: GSAForCausalLM, tokens: Tensor, see: Callable[[int, Parts, Projected, Asked], None], timed: bool = False
) -> None:
    """Show `see` what the core of each layer is given, and the layer's number, layer by layer; none of it need be kept.

    Args:
        model: in the mode, training or evaluation, in which it is to be seen.
        tokens: [B, T].
        see: called before each layer attends.
        timed: on a GPU compute in bf16, which the kernels need, whatever precision the model was trained in.
    """
    layers = [module for module in model.modules() if isinstance(module, GatedSparseAttention)]
    try:
        for layer in layers:
            layer.watch = functools.partial(see, layer.layer)
        with torch.no_grad(), autocast("auto", tokens.device) if timed else model.autocast():
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
