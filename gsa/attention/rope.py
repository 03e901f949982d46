"""Rotary position embedding (Su et al., arXiv 2104.09864), in the half-split layout of Llama checkpoints."""

import torch
from torch import Tensor


def rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotate the channels of `x` by angles that grow with its position.

    Args:
        x: [B, T, N, d], d even.
        positions: [B, T] integers, counted from the document's first token.
        theta: base of the geometric series of wavelengths.

    Returns:
        [B, T, N, d] in the type of `x`; angles are computed in at least fp32.
    """
    half = x.shape[-1] // 2
    precise = torch.promote_types(x.dtype, torch.float32)
    frequencies = theta ** (-torch.arange(half, device=x.device, dtype=precise) / half)
    angles = positions[..., None, None].to(precise) * frequencies  # [B, T, 1, d/2]
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half].to(precise), x[..., half:].to(precise)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
