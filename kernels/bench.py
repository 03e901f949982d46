"""Sparse attention on the kernels against the dense attention of PyTorch, on one GPU in one run: `gsa bench`.

What is timed is all of it: scores, selection and attention. Queries of the indexer follow a random walk, so that
neighbours agree on some of their keys: as far as u(32) says, the length of the union of 32 neighbours' selections over
k. The walk's memory is calibrated to the u(32) asked for, and the one that results is measured and given beside every
time. Times are medians.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from kernels.attend import attend
from kernels.dense import attend_all
from kernels.divergence import divergence
from kernels.select import select
from kernels.unions import unions
from kernels.windows import visible
from kernels.words import WORD

DENSE = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
MODES: dict[str, tuple[int, int, dict[str, int]]] = {  # indexer heads, their size, and what else is set
    "4x64": (4, 64, {}),
    "1x128": (1, 128, {}),
    "1x128, two levels": (1, 128, {"block": 32, "candidates": 8}),
    "1x128, windows of 32": (1, 128, {"share": 32}),
}
TAU = 10.0
OPERATIONS = ("forward", "training", "warmup", "decode")
# tokens, below which forwards are timed in a CUDA graph: the host takes as long as the GPU, or longer
SHORT = 2**15


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    lengths: tuple[int, ...] = (32768, 65536, 131072)
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    k: int = 2048
    overlaps: tuple[float, ...] = (2.5, 4.0)  # u(32)
    batches: tuple[int, ...] = (1, 8)  # of decoding
    operations: tuple[str, ...] = OPERATIONS
    repeats: int = 5


Row = dict[str, Any]


def rows(config: BenchConfig) -> Iterator[Row]:
    """One row per operation, length, indexer and overlap, as soon as it is measured."""
    for length in config.lengths:
        if {"forward", "training", "warmup"} & set(config.operations):
            yield from _rows_of_length(config, length)
        if "decode" in config.operations:
            for batch in config.batches:
                yield from _decode_rows(config, length, batch)


def milliseconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Median time of `run` on the GPU, after one that does not count."""
    run()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return float(statistics.median(times))


def graph_milliseconds(run: Callable[[], Any], repeats: int = 20) -> float:
    """Time of `run` in a CUDA graph, so that the host takes no part in it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay() -> None:
        for _ in range(repeats):
            graph.replay()

    return milliseconds(replay, 3) / repeats


def stages(run: Callable[[], Any]) -> dict[str, float]:
    """GPU milliseconds of `run` by kernel, the longest first, those of PyTorch's small operations together."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in found.key_averages():
        name = event.key.strip("_") if event.key.replace("_", "").isalpha() else "other"
        times[name] = times.get(name, 0.0) + event.device_time_total / 1e3
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def walk(length: int, width: int, memory: float) -> Tensor:
    """A stationary random walk [T, width]: x[t] = memory · x[t − 1] + noise, of deviation 1."""
    x = torch.randn(length, width, device="cuda") * math.sqrt(1 - memory**2)
    step, factor = 1, memory
    while step < length and factor > 1e-6:
        later = x.clone()
        later[step:] += factor * x[:-step]
        x, step, factor = later, 2 * step, factor**2
    return x


class Indexer:
    """Indexer tensors of one sequence's last `length` of `keys` tokens, and the selection of `k` keys by them."""

    def __init__(
        self, length: int, heads: int, size: int, k: int, memory: float, *, keys: int | None = None, **options: int
    ) -> None:
        keys = length if keys is None else keys
        self.q = walk(length, heads * size, memory).view(1, length, heads, size).bfloat16()
        self.k = torch.randn(1, keys, size, device="cuda").bfloat16()
        self.weight = walk(length, heads, memory).sigmoid()[None].bfloat16().contiguous()
        self.bias = torch.zeros(heads, device="cuda")
        self.starts = torch.zeros(1, keys, dtype=torch.long, device="cuda")
        self.wanted = torch.full((1, length), k, device="cuda")
        self.options = {"k_base": k, "k_min": k, "k_max": k, "documents": 1, **options}

    @property
    def scores(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.k, self.weight, self.bias

    def select(self) -> Tensor:
        inputs = (*self.scores, self.starts, self.wanted, self.wanted, None, None, None)
        words: Tensor = select(*inputs, **self.options)[0]
        return words


def overlap(words: Tensor, k: int, tile: int = WORD) -> float:
    """u(tile) of the last 2048 queries of `words` [B, N, S]."""
    last = words[:, -64:]
    return unions(last, words.shape[2], tile, words.shape[2]).counts.float().mean().item() / k


def calibrated(length: int, heads: int, size: int, k: int, u: float) -> float:
    """The walk's memory that makes u(32) of the last queries what is asked for."""
    low, high = 0.0, 12.0  # memory = 1 − 2^−x
    for _ in range(9):
        middle = (low + high) / 2
        words = Indexer(min(length, 4096), heads, size, k, 1 - 2**-middle, keys=length).select()
        low, high = (middle, high) if overlap(words, k) > u else (low, middle)
    return float(1 - 2 ** -((low + high) / 2))


def dense_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def dense_times(
    q: Tensor, k: Tensor, v: Tensor, time: Callable[[Callable[[], Any]], float], grad: Tensor | None = None
) -> dict[str, float]:
    """Milliseconds of each backend of PyTorch that takes these tensors; with `grad`, forward and backward."""
    found = {}
    inputs = (q, k, v)

    def run() -> Any:
        out = dense_attention(q, k, v, causal=q.shape[1] > 1)
        return out if grad is None else torch.autograd.grad(out, inputs, grad.transpose(1, 2))

    for name, backend in DENSE.items():
        try:
            with sdpa_kernel(backend):
                found[name] = time(run)
        except RuntimeError:  # PyTorch says so where a backend does not take grouped heads or these sizes
            continue
    return found


def _tensors(config: BenchConfig, batch: int, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((queries, config.heads), (keys, config.kv_heads), (keys, config.kv_heads))
    q, k, v = (torch.randn(batch, n, h, config.head_dim, device="cuda").bfloat16() for n, h in shapes)
    return q, k, v


def _row(config: BenchConfig, operation: str, length: int, mode: str, **found: Any) -> Row:
    dense = found["dense_ms"]
    ratio = min(dense.values()) / found["ours_ms"] if dense else math.nan
    heads = f"{config.heads}/{config.kv_heads}x{config.head_dim}"
    return {
        "operation": operation,
        "T": length,
        "heads": heads,
        "k": config.k,
        "indexer": mode,
        "speedup": ratio,
    } | found


def _rows_of_length(config: BenchConfig, length: int) -> Iterator[Row]:
    def time(run: Callable[[], Any]) -> float:
        return milliseconds(run, config.repeats)

    q, k, v = _tensors(config, 1, length, length)
    grad = torch.randn_like(q)
    dense = dense_times(q, k, v, time) if "forward" in config.operations or "warmup" in config.operations else {}
    trained = (q.detach().requires_grad_(), k.detach().requires_grad_(), v.detach().requires_grad_())
    dense_both = {}
    if "training" in config.operations or "warmup" in config.operations:
        dense_both = dense_times(*trained, time, grad)
    for name, (heads, size, options) in MODES.items():
        for u in config.overlaps if "share" not in options else config.overlaps[:1]:
            indexer = Indexer(length, heads, size, config.k, calibrated(length, heads, size, config.k, u), **options)
            most = config.k + options.get("share", 0)
            if "forward" in config.operations:
                yield _forward_row(config, name, indexer, (q, k, v), most, dense, time)
            if "training" in config.operations:
                yield _training_row(config, name, indexer, trained, grad, most, dense_both, time)
    if "warmup" in config.operations:
        for name in ("4x64", "1x128"):
            indexer = Indexer(length, *MODES[name][:2], config.k, 0.99)
            yield from _warmup_rows(config, name, indexer, (q, k, v), dense, dense_both, time)


def _forward_row(
    config: BenchConfig,
    name: str,
    indexer: Indexer,
    tensors: tuple[Tensor, Tensor, Tensor],
    most: int,
    dense: dict[str, float],
    time: Callable[[Callable[[], Any]], float],
) -> Row:
    """Of short sequences times in a CUDA graph, and beside them those of calls from the host."""

    def run() -> Any:
        return attend(*tensors, indexer.select(), most)

    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    result = run()
    peak = torch.cuda.max_memory_allocated() - held - sum(x.numel() * x.element_size() for x in result)
    del result
    words = indexer.select()
    found: Row = {"u32": overlap(words, config.k), "peak_gib": peak / 2**30, "stages_ms": stages(run)}
    if words.shape[2] < SHORT:
        found |= {"eager_ms": time(run), "dense_eager_ms": dense}
        dense, time = dense_times(*tensors, graph_milliseconds), graph_milliseconds
    found |= {
        "ours_ms": time(run),
        "select_ms": time(indexer.select),
        "attend_ms": time(lambda: attend(*tensors, words, most)),
        "dense_ms": dense,
    }
    return _row(config, "forward", words.shape[2], name, **found)


def _training_row(
    config: BenchConfig,
    name: str,
    indexer: Indexer,
    trained: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    most: int,
    dense: dict[str, float],
    time: Callable[[Callable[[], Any]], float],
) -> Row:
    """Forward, KL loss and the backward of both."""
    scores = [x.detach().requires_grad_() for x in indexer.scores]
    q, k, _ = (x.detach() for x in trained)

    def run() -> Any:
        words = indexer.select()
        out, lse = attend(*trained, words, most)
        loss = divergence(q, k, lse.detach(), words, *scores, most, "gated_sigmoid", TAU)[0]
        return torch.autograd.grad((out, loss), [*trained, *scores], (grad, torch.ones_like(loss)))

    found = {"u32": overlap(indexer.select(), config.k), "ours_ms": time(run), "dense_ms": dense}
    return _row(config, "forward + backward with KL", q.shape[1], name, **found, stages_ms=stages(run))


def _warmup_rows(
    config: BenchConfig,
    name: str,
    indexer: Indexer,
    tensors: tuple[Tensor, Tensor, Tensor],
    dense: dict[str, float],
    dense_both: dict[str, float],
    time: Callable[[Callable[[], Any]], float],
) -> Iterator[Row]:
    """Dense attention that trains the indexer only."""
    length = tensors[0].shape[1]
    scores = [x.detach().requires_grad_() for x in indexer.scores]

    def forward() -> Tensor:
        words = visible(indexer.starts, torch.arange(length, device="cuda"), length)
        _, lse = attend_all(*tensors)
        loss: Tensor = divergence(*tensors[:2], lse, words, *scores, length, "gated_sigmoid", TAU)[0]
        return loss

    loss = forward()
    forward_ms = time(forward)
    backward_ms = time(lambda: torch.autograd.grad(loss, scores, retain_graph=True))
    backward = {backend: dense_both[backend] - dense[backend] for backend in dense if backend in dense_both}
    yield _row(config, "warm-up forward with KL", length, name, ours_ms=forward_ms, dense_ms=dense)
    yield _row(config, "warm-up backward of KL", length, name, ours_ms=backward_ms, dense_ms=backward)


def _decode_rows(config: BenchConfig, length: int, batch: int) -> Iterator[Row]:
    """One new token for each of `batch` sequences of `length` tokens, in a CUDA graph."""
    q, k, v = _tensors(config, batch, 1, length)
    dense = dense_times(q, k, v, graph_milliseconds)
    for name in ("4x64", "1x128"):
        heads, size, _ = MODES[name]
        index_q = torch.randn(batch, 1, heads, size, device="cuda").bfloat16()
        index_k = torch.randn(batch, length, size, device="cuda").bfloat16()
        weight, bias = torch.rand(batch, 1, heads, device="cuda").bfloat16(), torch.zeros(heads, device="cuda")
        starts = torch.zeros(batch, length, dtype=torch.long, device="cuda")
        wanted = torch.full((batch, 1), config.k, device="cuda")

        def run() -> Any:
            inputs = (index_q, index_k, weight, bias, starts, wanted, wanted, None, None, None)  # noqa: B023
            words = select(*inputs, k_base=config.k, k_max=config.k)[0]
            return attend(q, k, v, words, config.k)

        found = {"batch": batch, "ours_ms": graph_milliseconds(run), "dense_ms": dense, "stages_ms": stages(run)}
        yield _row(config, "decode", length, name, **found)
