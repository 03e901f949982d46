"""200 steps of training on each backend, from the same seed on the same text: `python -m tests.kernels.training`.

Prints the losses of each step as JSON; with a third run, on the same text in another order, they say what noise is.
The text is the Python source of `torch.nn`, by bytes.
"""

import json
from pathlib import Path
from typing import Literal

import torch
from torch.nn import functional as F

from gsa.attention.config import AttentionConfig
from gsa.attention.controller import ControllerConfig
from gsa.attention.selection import SelectionConfig
from gsa.model import GSAForCausalLM, ModelConfig

WARMUP = 20


def curves(steps: int = 200, length: int = 1024, batch: int = 8, device: str = "cuda") -> dict[str, list[float]]:
    """Loss by step, in nats per byte: of `torch`, `triton` and `torch` with another `order`."""
    data = torch.frombuffer(bytearray(_text()), dtype=torch.uint8).long().to(device)
    runs: tuple[tuple[str, Literal["torch", "triton"], int], ...]
    runs = (("torch", "torch", 0), ("triton", "triton", 0), ("order", "torch", 1))
    return {name: _train(backend, seed, data, steps, length, batch) for name, backend, seed in runs}


def _text() -> bytes:
    files = sorted((Path(torch.__file__).parent / "nn").rglob("*.py"))
    return b"".join(file.read_bytes() for file in files)


def _train(
    backend: Literal["torch", "triton"], seed: int, data: torch.Tensor, steps: int, length: int, batch: int
) -> list[float]:
    torch.manual_seed(0)
    attention = AttentionConfig(
        hidden_size=256, num_heads=8, num_kv_heads=2, head_dim=64, backend=backend,
        controller=ControllerConfig(kind="variance", k=128, k_min=32, k_max=256),
        selection=SelectionConfig(local_window=16),
    )  # fmt: skip
    model = GSAForCausalLM(ModelConfig(num_layers=4, vocab_size=256, attention=attention)).to(data.device)
    of_indexer = {id(p) for p in model.indexer_parameters()}
    groups = [[p for p in model.parameters() if (id(p) in of_indexer) == chosen] for chosen in (False, True)]
    rates = (1e-3, 1e-2)
    optimizer = torch.optim.AdamW(
        [{"params": g, "lr": rate} for g, rate in zip(groups, rates, strict=True)], betas=(0.9, 0.95)
    )
    generator, losses = torch.Generator().manual_seed(seed), []
    for step in range(steps):
        firsts = torch.randint(0, len(data) - length - 1, (batch,), generator=generator)
        rows = torch.stack([data[i : i + length + 1] for i in firsts])
        with torch.autocast(data.device.type, torch.bfloat16, enabled=data.is_cuda):
            output = model.run(rows[:, :-1], indexer_loss=True)
        loss = F.cross_entropy(output.logits.float().flatten(0, 1), rows[:, 1:].flatten())
        assert output.indexer_loss is not None
        optimizer.zero_grad()
        (loss + output.indexer_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1, (step + 1) / WARMUP)
        optimizer.step()
        if output.uncertainty is not None:
            model.update_references(output.uncertainty)
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(json.dumps(curves()))
