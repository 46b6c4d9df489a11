"""flora_shuffled: FLoRA without locality, its kernel positions in a fixed random order."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from flora.adapters.config import FloraConfig
from flora.adapters.conv import ConvNd
from flora.adapters.linear import Linear
from flora.adapters.model import FloraModel
from flora.methods.rivals.base import CONV, LINEAR
from flora.replaced.config import PeftMethod
from flora.replaced.layer import Form
from flora.replaced.model import Layers, ReplacedModel


@dataclass
class FloraShuffledConfig(FloraConfig):
    """flora_shuffled: FLoRA of the weight with its kernel positions in a fixed random order."""

    method: ClassVar[PeftMethod] = PeftMethod("FLORA_SHUFFLED")
    permutation_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init == "hosvd":
            raise ValueError("init: hosvd reads the weight in its own order; flora_shuffled takes the other starts")
        if self.forward == "factored":
            raise ValueError("forward: flora_shuffled runs with W + update; use auto or merged")
        if self.flora_dropout:
            raise ValueError("flora_dropout: flora_shuffled runs with W + update, which excludes dropout on its input")
        if isinstance(self.permutation_seed, bool) or not isinstance(self.permutation_seed, int):
            raise ValueError(f"permutation_seed: must be an integer, got {self.permutation_seed!r}")


def kernel_order(kernel: tuple[int, ...], seed: int) -> Tensor:
    """The order of a kernel's positions, counted row by row: equal for all kernels of one size and seed."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randperm(math.prod(kernel), generator=generator, device="cpu")  # its values, also on a meta model


class ShuffledConv(ConvNd):
    """A convolution whose update is a Tucker form with permuted kernel positions."""

    other_param_names = (*ConvNd.other_param_names, "orders")
    orders: dict[str, list[int]]

    @override
    def create_containers(self) -> None:
        super().create_containers()
        self.orders = {}

    @override
    def create_parameters(self, adapter_name: str, config: Any, name: str) -> None:
        order = kernel_order(tuple(self.get_base_layer().kernel_size), config.permutation_seed)
        self.orders[adapter_name] = order.tolist()
        super().create_parameters(adapter_name, config, name)

    @override
    def form_apart(self, adapter_name: str) -> Form | None:
        return None

    @override
    def get_delta_weight(self, adapter: str, weight: str | None = None) -> Tensor:
        local = super().get_delta_weight(adapter, weight)
        return local.flatten(2)[..., self.orders[adapter]].reshape(local.shape)


class FloraShuffledModel(FloraModel):
    """The PEFT tuner of flora_shuffled."""

    layer_classes: ClassVar[Layers] = ((LINEAR, Linear), (CONV, ShuffledConv))
    add_weighted_adapter = ReplacedModel.add_weighted_adapter  # which refuses
