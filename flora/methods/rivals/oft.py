"""PEFT's OFT (arXiv 2306.07280) with two of its forward passes mended.

In PEFT 0.21 a linear layer takes an input of four dimensions (the maps of ConvNeXt and Swin) for an image, and a
convolution rotates overlapping patches and sums them, so that even the identity as rotation changes the model.
Parameters, rotation and merging are PEFT's.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import OFTConfig
from peft.tuners.oft.layer import Conv2d, Linear
from peft.tuners.oft.model import OFTModel
from torch import Tensor, nn
from typing_extensions import override

from flora.replaced.config import PeftMethod


@dataclass
class OftConfig(OFTConfig):
    """PEFT's OFTConfig for the layers below."""

    method: ClassVar[PeftMethod] = PeftMethod("OFT_MENDED")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.method


class OftLinear(Linear):
    """x R W^T for inputs ``[..., in]`` of any number of dimensions."""

    @override
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1]), *args, **kwargs).reshape(*x.shape[:-1], -1)


class OftConv2d(Conv2d):
    """A convolution with W R^T, W being the kernel flattened to ``[out, in * kernel]``: what merging gives."""

    @override
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapters = [adapter for adapter in self.active_adapters if adapter in self.oft_R]
        if self.disable_adapters or self.merged or not adapters:
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        weight = base.weight.flatten(1)
        for adapter in adapters:
            weight = weight @ self.get_delta_weight(adapter).to(weight.dtype).T
        return torch.func.functional_call(base, {"weight": weight.view_as(base.weight)}, (x,))


class OftModel(OFTModel):
    """The PEFT tuner of both."""

    @staticmethod
    @override
    def _create_new_module(oft_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        kinds = ((nn.Linear, OftLinear), (nn.Conv2d, OftConv2d))
        for kind, layer in kinds:
            if isinstance(target, kind) and getattr(target, "groups", 1) == 1:
                return layer(target, adapter_name, config=oft_config, **kwargs)
        raise ValueError("target_modules: oft adapts linear layers and 2-D convolutions without groups")
