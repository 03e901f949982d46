"""What tests on a GPU share."""

import pytest
import torch
from torch import Tensor

from kernels.support import INTERPRET

needs_gpu = pytest.mark.skipif(INTERPRET or not torch.cuda.is_available(), reason="needs a GPU and TRITON_INTERPRET=0")


def off(found: Tensor, exact: Tensor) -> float:
    """The error of what was found, as a share of what is exact."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())
