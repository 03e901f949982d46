"""How fast each layer of a trained model attends, on a text and with the selections that it makes there."""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gsa.attention.attention import GatedSparseAttention
from gsa.attention.core import Asked, Parts, Projected
from gsa.attention.fused import attend_fused, problem
from gsa.data.packing import prepare
from gsa.errors import RequestError
from gsa.model import GSAForCausalLM
from gsa.tracking import TrackingConfig
from gsa.training import checkpoint
from kernels.bench import Row, dense_times, milliseconds, overlap


def checkpoint_rows(source: str, length: int | None, tracking: TrackingConfig, storage: Path) -> Iterator[Row]:
    """`layer_rows` of a checkpoint on its own held-out text.

    Args:
        source: a folder, `runs:/<run_id>` or a run id.
        length: tokens of text; `None` for the context length it was trained with.
        tracking, storage: where runs are found, and where tokenized text is cached.

    Raises:
        RequestError: there is no such checkpoint, its held-out text is too short, or the kernels cannot run a layer.
    """
    if not Path(source).exists() and re.fullmatch(r"[0-9a-f]{32}", source):
        source = f"runs:/{source}"
    found = checkpoint.find(source, tracking, storage)
    config = found.config()
    windows = prepare(config.data, storage / "data").held_out
    wanted = length or config.data.context_length
    count = -(-wanted // config.data.context_length)
    if count > len(windows):
        most = len(windows) * config.data.context_length
        raise RequestError(f"{source}: its held-out text has {most} tokens, fewer than the {wanted} asked for")
    tokens = windows.batch(range(count)).tokens.reshape(1, -1)[:, :wanted]
    yield from layer_rows(checkpoint.load(found).cuda().eval(), tokens.cuda())


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
    layers = [module for module in model.modules() if isinstance(module, GatedSparseAttention)]
    try:
        for layer in layers:
            layer.watch = lambda *given: seen.append(given)
        with torch.no_grad(), torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
            model.run(tokens)
    finally:
        for layer in layers:
            layer.watch = None
    return seen


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
