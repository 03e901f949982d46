"""Every kernel at small shapes, for NVIDIA's checkers of memory and races, on a GPU; each takes two to three minutes:

    export TRITON_INTERPRET=0 PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck python -m tests.kernels.sanitize
    compute-sanitizer --tool racecheck --kernel-name-exclude kernel_substring=tiles \\
        --kernel-name-exclude kernel_name=mark --kernel-name-exclude kernel_name=_divergence \\
        python -m tests.kernels.sanitize

Each tensor is allocated alone, else what lies beyond one is memory of the cache that PyTorch keeps. racecheck knows
neither mbarriers nor the barrier at which Gluon's groups of warps begin, and takes what is handed over there in shared
memory for a hazard: the kernels of `kernels.hopper`, `kernels.hopper_backward`, `kernels.target_tiles` (`..._tiles`),
`kernels.marks` and `kernels.dense_divergence` are left out of it. Of `mark` alone it tells of nothing else.
"""

import sys

import pytest
import torch

from gsa.attention.attention import GatedSparseAttention
from gsa.attention.cache import Cache
from gsa.attention.config import AttentionConfig, Stage
from gsa.attention.controller import ControllerConfig
from gsa.attention.selection import CoarseConfig, SelectionConfig
from kernels.attend import attend
from kernels.select import select
from tests.draw import CONTROLLERS, Draw
from tests.kernels.ways import go_the_way
from tests.seeds import seed_of


def selection(draw: Draw) -> None:
    """All queries of short rows, the last ones of longer rows; documents, one of which begins behind its padding."""
    for heads, size in ((1, 128), (4, 64)):
        for length, keys in ((701, 701), (130, 1000), (64, 9001), (3, 700)):
            q, k = draw.normal(2, length, heads, size).cuda().bfloat16(), draw.normal(2, keys, size).cuda().bfloat16()
            weight, bias = draw.normal(2, length, heads).cuda().sigmoid().bfloat16(), torch.zeros(heads, device="cuda")
            starts = torch.zeros(2, keys, dtype=torch.long, device="cuda")
            starts[:, keys - 60 :] = keys - 60
            starts[1, :40] = 40
            wanted = torch.full((2, length), 100, device="cuda")
            inputs = (q, k, weight, bias, starts, wanted, wanted, None, None, None)
            for way in ("rows", "marks", "wrong bounds"):
                for options in ({}, {"share": 32}, {"block": 32, "candidates": 2}, {"share": 5, "local_window": 3}):
                    with pytest.MonkeyPatch.context() as patch:
                        go_the_way(way, patch)
                        select(*inputs, k_base=100, k_min=20, k_max=100, sink_tokens=1, documents=3, **options)
            torch.cuda.synchronize()


def attention(draw: Draw) -> None:
    """Forward and backward, also deterministic, of groups and head sizes in tiles of Gluon and of Triton."""
    for heads, kv_heads, size in ((8, 2, 128), (4, 4, 64), (16, 1, 128), (6, 2, 64), (80, 1, 64)):
        for length, keys in ((301, 301), (70, 400)):
            shapes = ((length, heads), (keys, kv_heads), (keys, kv_heads))
            q, k, v = (draw.normal(2, n, h, size).cuda().bfloat16().requires_grad_() for n, h in shapes)
            words = (torch.rand(2, -(-length // 32), keys, device="cuda") < 0.3).int() * draw.random.randint(1, 2**30)
            words[:, :, -length:] = 0
            for exactly in (False, True):
                out, _ = attend(q, k, v, words, keys, exactly)
                out.float().sum().backward()
            torch.cuda.synchronize()


def layers(draw: Draw) -> None:
    """Whole layers with their indexer's loss, in all stages."""
    stages: tuple[Stage, ...] = ("sparse", "warmup", "dense")
    for controller in CONTROLLERS:
        for stage in stages:
            coarse = draw.random.choice([None, CoarseConfig()])
            config = AttentionConfig(
                hidden_size=256, num_heads=8, num_kv_heads=2, head_dim=64, backend="triton",
                controller=ControllerConfig(kind=controller, k=64, k_min=16, k_max=128),
                selection=SelectionConfig(local_window=8, sink_tokens=2, coarse=coarse),
            )  # fmt: skip
            layer = GatedSparseAttention(config).cuda()
            hidden = draw.normal(2, 300, 256).cuda().float()
            starts = torch.zeros(2, 300, dtype=torch.long, device="cuda")
            starts[:, 120:] = 120
            with torch.autocast("cuda", torch.bfloat16):
                result = layer.attend(hidden, starts, stage=stage, indexer_loss=True)
            loss = result.output.float().sum()
            if result.indexer_loss is not None:
                loss = loss + result.indexer_loss
            loss.backward()
            torch.cuda.synchronize()


def decoding(draw: Draw) -> None:
    """A prompt, then one token and three at a time, in a cache with room to grow."""
    for share in (1, 8):
        config = AttentionConfig(
            hidden_size=256, num_heads=8, num_kv_heads=2, head_dim=64, backend="triton",
            controller=ControllerConfig(kind="fixed", k=64, k_min=32, k_max=64), selection=SelectionConfig(share=share),
        )  # fmt: skip
        layer = GatedSparseAttention(config).cuda().bfloat16().eval()
        hidden = draw.normal(3, 210, 256).cuda().bfloat16()
        cache = Cache(1, 230)
        with torch.no_grad():
            for part in hidden.split([200, 1, 3, 1, 5], 1):
                starts = cache.extend_starts(None, 3, part.shape[1], part.device)
                layer.attend(part, starts, cache=cache.layers[0])
        torch.cuda.synchronize()


if __name__ == "__main__":
    for check in (selection, attention, layers, decoding):
        if check.__name__ in sys.argv[1:] or not sys.argv[1:]:
            check(Draw(seed_of(check.__name__)))
            print(check.__name__, flush=True)
