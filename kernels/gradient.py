"""Gradients that many programs add to: relaxed atomics in fp32, or in fixed point where runs must be bitwise equal.

fp32 sums depend on their order and atomics have none; integer sums do not. A fixed-point gradient spends its 63 bits on
a bound of the sum, from norms of what is multiplied, so that it cannot overflow and keeps at least fp32's resolution of
all that matters at 128K tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


class Gradient:
    """The gradient of `of`, a sum of up to `terms` terms of magnitude up to `largest`.

    Attributes:
        sum: what kernels add to, fp32 or int64 in the shape of `of`.
        unit: fp32 scalar, what one of the int64's is worth.
    """

    def __init__(self, of: Tensor, largest: Tensor, terms: int, deterministic: bool) -> None:
        self.sum = torch.zeros(of.shape, dtype=torch.int64 if deterministic else torch.float32, device=of.device)
        exponent = torch.frexp(largest.float() * max(terms, 1) + 1e-30)[1] - 62
        self.unit = torch.ldexp(torch.ones((), device=of.device), exponent.clamp(-126, 127))

    def result(self, kind: torch.dtype) -> Tensor:
        if self.sum.dtype == torch.int64:
            return (self.sum.double() * self.unit.double()).to(kind)
        return self.sum.to(kind)


@triton.jit
def add(gradient, place, value, mask, unit, FIXED: tl.constexpr):
    """Add a block of values to a gradient, `unit` points to `Gradient.unit`."""
    if FIXED:
        value = (value / tl.load(unit)).to(tl.int64)
    tl.atomic_add(gradient + place, value, mask=mask, sem="relaxed")
