"""Which GPUs kernels can run on here, and whether this is our `kernels` that Python finds."""

import importlib.util

import torch

OLDEST = (8, 0)  # Ampere: bf16 tensor cores and asynchronous copies


def problem() -> str | None:
    """Why Triton kernels cannot run on this machine, in one line; `None` where they can."""
    if not torch.cuda.is_available():
        return "no CUDA GPU is visible to torch"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        return f"{torch.cuda.get_device_name()} is sm_{capability[0]}{capability[1]}: sm_80 (Ampere) or newer is needed"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None
