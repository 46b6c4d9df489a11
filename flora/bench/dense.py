"""The published layer, for comparison: builds its whole update by mode products and applies it by an op of its own.

As in the code of the paper (github.com/SJTU-DeepVisionLab/FLoRA): every layer by itself, every forward anew, without
regard to groups, so depthwise convolutions crash here as they do there.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from flora.adapters.conv import ConvNd
from flora.adapters.layer import FloraLayer
from flora.adapters.linear import Linear
from flora.adapters.tucker import mode_product

_CONV: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class DenseLayer(nn.Module):
    """A layer with the published forward; it takes the base layer and the parameters of a FLoRA layer over.

    Args:
        layer: a linear layer or a convolution with an adapter named ``default``.
    """

    def __init__(self, layer: FloraLayer) -> None:
        super().__init__()
        self.base_layer = layer.get_base_layer()
        self.core = layer.core("default")
        self.factors = nn.ParameterList(f for f in layer.factors("default") if f is not None)
        self.modes = [mode for mode, factor in enumerate(layer.factors("default")) if factor is not None]
        self.scale = layer.scale_of("default")

    def delta(self) -> Tensor:
        """The update, one mode product after the other in the order of the modes."""
        delta: Tensor = self.core
        for mode, factor in zip(self.modes, self.factors, strict=True):
            delta = mode_product(delta, factor, mode)
        return self.scale * delta

    def forward(self, input: Tensor) -> Tensor:
        """The base layer's output and the update's."""
        base, delta = self.base_layer, self.delta()
        if isinstance(base, nn.Linear):
            return base(input) + F.linear(input, delta)
        conv = _CONV[delta.dim() - 2]
        return base(input) + conv(input, delta, None, base.stride, base.padding, base.dilation)


def make_dense(model: nn.Module) -> None:
    """Put the published forward in place of FLoRA's in all linear layers and convolutions of a model."""
    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, FloraLayer)]
    for name, layer in adapted:
        if not isinstance(layer, Linear | ConvNd):
            raise ValueError(f"dense: the published code has no {type(layer).__name__} layer ({name})")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, DenseLayer(layer))
