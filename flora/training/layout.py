"""Images in the order that convolutions on tensor cores read: all channels of a pixel side by side."""

from typing import Any

import torch
from torch import Tensor, nn

from flora.models.feature_maps import FeatureMaps


def channels_last(model: nn.Module) -> None:
    """Have a network of images run in ``torch.channels_last``: same numbers but for their rounding.

    Images ``[B, C, H, W]`` are reordered where they come in, and each layer keeps the order that it is given. Frozen
    weights of convolutions are reordered once, trained ones where they are used: what is saved stays as it was.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        if module is model or isinstance(module, FeatureMaps):  # a detector makes its batch of a list of images
            module.register_forward_pre_hook(_reorder, with_kwargs=True)


def _reorder(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return tuple(map(_reordered, args)), {name: _reordered(value) for name, value in kwargs.items()}


def _reordered(value: Any) -> Any:
    images = isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()
    return value.contiguous(memory_format=torch.channels_last) if images else value
