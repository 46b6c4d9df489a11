"""In which dtype a layer computes."""

import contextlib
from typing import Any

import torch
from torch import Tensor


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Where autocast is on, a context without it: small products cost more to convert than to compute."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a matrix product or convolution with this weight runs now."""
    device = weight.device.type
    if device == "meta":
        return weight.dtype
    casts = torch.is_autocast_enabled(device) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else weight.dtype
