"""Causal attention to everything with the sums that the indexer's loss needs: PyTorch's fastest kernels give them."""

import torch
from torch import Tensor

from kernels.attend import attend
from kernels.windows import visible


def attend_all(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What `kernels.attend.attend` gives for one document of T tokens that all attend to all before them.

    Args:
        q: [B, T, H, d], as `k` and `v` without gradient.
        k: [B, T, K, d].
        v: [B, T, K, d].

    Returns:
        The output [B, T, H, d] and the logarithm of the sum of exp(q·k/√d), [B, T, H] fp32.
    """
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    if q.is_cuda:
        params = torch.backends.cuda.SDPAParams(queries, keys, values, None, 0.0, True, True)
        if torch.backends.cuda.can_use_cudnn_attention(params):
            out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
                queries, keys, values, None, True, 0.0, True
            )
            return out.transpose(1, 2), lse.flatten(2).transpose(1, 2)
        if torch.backends.cuda.can_use_flash_attention(params):
            out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(queries, keys, values, 0.0, True)
            return out.transpose(1, 2), lse.transpose(1, 2)
    starts = torch.zeros(q.shape[:2], dtype=torch.long, device=q.device)
    everything = visible(starts, torch.arange(q.shape[1], device=q.device), q.shape[1])
    attended: tuple[Tensor, Tensor] = attend(q, k, v, everything, q.shape[1])
    return attended
