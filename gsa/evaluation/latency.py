"""Attention's latency and memory at a target length as metrics of a trained model: objectives of a search.

On a GPU that the kernels run on they are measured, with the model's own selections on held-out text. Elsewhere they
are modelled (`gsa.evaluation.cost_model`), and `attention_latency_measured` says so. Whoever measures sees to it that
nothing else runs on the GPU (`gsa.training.turns`).
"""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gsa.attention.core import Asked, Parts, Projected
from gsa.attention.fused import attend_fused, problem
from gsa.data.packing import Prepared, Windows
from gsa.errors import RequestError
from gsa.evaluation.cost_model import modelled_cost
from gsa.evaluation.mode import evaluating
from gsa.evaluation.speed import watch_cores
from gsa.model import GSAForCausalLM
from kernels import support
from kernels.bench import dense_times, milliseconds

OBSERVED = 4096  # tokens of held-out text from which a modelled latency takes its selections


def measure_latency(model: GSAForCausalLM, data: Prepared, target_length: int, repeats: int = 7) -> dict[str, float]:
    """Latency and memory of one forward's attention on one document of `target_length` tokens.

    Attention is scores, selection and attention of every layer, in bf16; projections, gates and MLPs are not in it. The
    document is held-out text from its beginning, start tokens included, again and again where it is shorter.

    Args:
        model: on the device to measure on, in either mode.
        data: gives the held-out text.
        target_length: tokens.
        repeats: how often each layer is timed, after one time that does not count.

    Returns:
        `attention_latency_ms`: the sum over layers of the median time.
        `attention_latency_spread_ms`: the interquartile range, over the repeats, of the sum over layers; 0 if modelled.
        `attention_latency_measured`: 1 measured on this GPU, 0 modelled for the cost model's reference GPU.
        `attention_speedup`: of the fastest dense attention of PyTorch over this, in the same run; only if measured.
        `peak_memory_gib`: memory that attention takes beside its inputs, output included, in the layer that takes most.

    Raises:
        RequestError: a number below 1, or the GPU is fit for the kernels but they cannot run a layer.
    """
    if target_length < 1 or repeats < 1:
        raise RequestError(f"latency at target_length = {target_length}, repeats = {repeats}: both must be >= 1")
    device = next(model.parameters()).device
    measured = device.type == "cuda" and support.problem() is None
    with evaluating(model):
        if measured:
            tokens = long_text(data.held_out, target_length).to(device)
            return _measured(model, tokens, repeats)
        return _modelled(model, _observed_text(data.held_out, target_length).to(device), target_length)


def long_text(windows: Windows, length: int) -> Tensor:
    """The first `length` tokens [1, length] of a split, which is repeated where it is shorter."""
    tokens = np.resize(windows.tokens[:length], length).astype(np.int64)
    return torch.from_numpy(tokens)[None]


def interquartile_range(values: list[float]) -> float:
    """Between the quartiles, which are interpolated; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first


class _Timed(NamedTuple):
    times: list[float]  # milliseconds
    dense: float
    bytes: int


def _measured(model: GSAForCausalLM, tokens: Tensor, repeats: int) -> dict[str, float]:
    layers: list[_Timed] = []

    def see(layer: int, parts: Parts, projected: Projected, asked: Asked) -> None:
        reason = problem(parts, projected)
        if reason is not None:
            raise RequestError(f"latency of layer {layer}: {reason}")

        def run() -> Any:
            return attend_fused(parts, projected, asked)

        run()  # compiles what is to be compiled
        peak = _peak_bytes(run, tokens.device)
        times = [_milliseconds(run) for _ in range(repeats)]
        dense = dense_times(projected.q, projected.k, projected.v, lambda dense: milliseconds(dense, repeats))
        layers.append(_Timed(times, min(dense.values()), peak))

    with torch.cuda.device(tokens.device):
        watch_cores(model, tokens, see, timed=True)
    latency = sum(statistics.median(layer.times) for layer in layers)
    return {
        "attention_latency_ms": latency,
        "attention_latency_spread_ms": interquartile_range(
            [sum(r) for r in zip(*(x.times for x in layers), strict=True)]
        ),
        "attention_latency_measured": 1.0,
        "attention_speedup": sum(layer.dense for layer in layers) / latency,
        "peak_memory_gib": max(layer.bytes for layer in layers) / 2**30,
    }


def _milliseconds(run: Callable[[], Any]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def _peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - held


def _modelled(model: GSAForCausalLM, tokens: Tensor, target_length: int) -> dict[str, float]:
    cost = modelled_cost(model, tokens, target_length)
    return {
        "attention_latency_ms": cost.milliseconds,
        "attention_latency_spread_ms": 0.0,
        "attention_latency_measured": 0.0,
        "peak_memory_gib": cost.workspace / 2**30,
    }


def _observed_text(windows: Windows, target_length: int) -> Tensor:
    """Held-out sequences [B, T], evenly spaced, as long as those that the model was trained on but not longer than
    the target."""
    length, available = windows.config.context_length, len(windows)
    count = min(max(OBSERVED // length, 1), available)
    return windows.batch(i * available // count for i in range(count)).tokens[:, :target_length]
