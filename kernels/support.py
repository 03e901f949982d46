"""Which GPUs kernels can run on here, and how they are launched."""

import importlib.util
import os

import torch
from torch import Tensor

OLDEST = (8, 0)  # Ampere: bf16 tensor cores and asynchronous copies
TRITON = importlib.util.find_spec("triton") is not None
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter: kernels run on the CPU, slowly


def problem() -> str | None:
    """Why Triton kernels cannot run on this machine, in one line; `None` where they can."""
    if not TRITON:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "no CUDA GPU is visible to torch"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        return f"{torch.cuda.get_device_name()} is sm_{capability[0]}{capability[1]}: sm_80 (Ampere) or newer is needed"
    return None


# `torch.compiler.assume_constant_result` does no more, and imports the compiler: a second that few processes need
problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def runs_triton(tensor: Tensor) -> bool:
    """Whether an operation on `tensor` goes to its Triton kernel rather than to its PyTorch definition."""
    return tensor.is_cuda or INTERPRET


def tuned(tensor: Tensor) -> bool:
    """Whether kernels on `tensor` take the block sizes that were tuned on an H100.

    They want the registers and the shared memory of sm_90. Elsewhere smaller ones run, which fit any GPU from sm_80 on.
    """
    return not tensor.is_cuda or torch.cuda.get_device_capability(tensor.device)[0] == 9


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up. Triton's own, which its compiler can call too, takes microseconds: as long as an operation."""
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    """The least power of two that is at least x, which is positive."""
    return 1 << (x - 1).bit_length()
