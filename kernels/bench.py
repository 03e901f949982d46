"""The whole forward of sparse attention against dense attention: `python -m kernels.bench`.

What is timed is all of it: scores, selection and attention. Queries of the indexer follow a random walk, so that
neighbours agree on some of their keys; `--memory` says how far, and the u(32) that results is measured and printed
beside every time. All times are medians of one run on one GPU.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attend import attend
from kernels.select import select
from kernels.unions import causal_ends, unions
from kernels.words import WORD

DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


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
    """Indexer tensors of one sequence and the selection of `k` keys by them."""

    def __init__(self, length: int, heads: int, size: int, k: int, memory: float, **options: int) -> None:
        self.q = walk(length, heads * size, memory).view(1, length, heads, size).bfloat16()
        self.k = torch.randn(1, length, size, device="cuda").bfloat16()
        self.weight = walk(length, heads, memory).sigmoid()[None].bfloat16().contiguous()
        self.bias = torch.zeros(heads, device="cuda")
        self.starts = torch.zeros(1, length, dtype=torch.long, device="cuda")
        self.wanted = torch.full((1, length), k, device="cuda")
        self.options = {"k_base": k, "k_max": k, **options}

    def select(self) -> Tensor:
        inputs = (self.q, self.k, self.weight, self.bias, self.starts, self.wanted, self.wanted, None, None)
        words: Tensor = select(*inputs, **self.options)[0]
        return words


def overlap(words: Tensor, k: int, tile: int = 32) -> float:
    """u(tile) of the last 2048 queries."""
    last = words[:, -64:]
    length = words.shape[1] * WORD
    lists = unions(last, causal_ends(last, length, length - last.shape[1] * WORD), tile, words.shape[2])
    return lists.counts.float().mean().item() / k


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def measure(length: int, heads: int, kv_heads: int, size: int, k: int, memory: float) -> list[dict[str, Any]]:
    """Rows of results for one length."""
    q, key, value = (torch.randn(1, length, n, size, device="cuda").bfloat16() for n in (heads, kv_heads, kv_heads))
    dense = {}
    for name, backend in DENSE.items():
        with sdpa_kernel(backend):
            dense[name] = milliseconds(lambda: dense_attention(q, key, value))
    rows = []
    modes: dict[str, tuple[int, int, dict[str, int]]] = {
        "4x64": (4, 64, {}),
        "1x128": (1, 128, {}),
        "1x128, blocks of 32, 8k candidates": (1, 128, {"block": 32, "candidates": 8}),
        "1x128, windows of 32": (1, 128, {"share": 32}),
    }
    for name, (index_heads, index_size, options) in modes.items():
        indexer = Indexer(length, index_heads, index_size, k, memory, **options)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        words = indexer.select()
        most = k + options.get("share", 0)
        attend(q, key, value, words, most)
        peak = torch.cuda.max_memory_allocated() - held
        row: dict[str, Any] = {"T": length, "heads": f"{heads}/{kv_heads}", "indexer": name, "u32": overlap(words, k)}
        row["select_ms"] = milliseconds(indexer.select)
        row["attend_ms"] = milliseconds(lambda: attend(q, key, value, words, most))  # noqa: B023
        row["total_ms"] = milliseconds(lambda: attend(q, key, value, indexer.select(), most))  # noqa: B023
        row |= {f"{backend}_ms": time for backend, time in dense.items()}
        row["speedup"] = min(dense.values()) / row["total_ms"]
        row["peak_gib"] = peak / 2**30
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 65536, 131072], help="tokens")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--k", type=int, default=2048, help="keys of a query")
    parser.add_argument("--memory", type=float, default=0.99, help="of the random walk; nearer to 1 is more overlap")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    rows = []
    for length in options.lengths:
        rows += measure(length, options.heads, options.kv_heads, options.head_dim, options.k, options.memory)
    if options.json:
        print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}, indent=1))
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, k = {options.k}")
    for row in rows:
        print("  ".join(f"{n} {v:.2f}" if isinstance(v, float) else f"{n} {v}" for n, v in row.items()))


if __name__ == "__main__":
    main()
