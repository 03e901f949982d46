"""Which precision a model computes in: one rule for training, evaluation, generation and memory estimates."""

import contextlib

import torch

PRECISIONS = ("auto", "fp32", "bf16")


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether fp32 models run under bf16 autocast: with `bf16` on every device, with `auto` on a GPU alone."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context in which an fp32 model of this precision runs on a device."""
    return torch.autocast(device.type, torch.bfloat16) if uses_bf16(precision, device) else contextlib.nullcontext()
