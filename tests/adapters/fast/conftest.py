"""What tests of the fast path share: float64 by default, and images."""

import pytest
import torch
from torch import Tensor


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(5, 3, 6, 6)
