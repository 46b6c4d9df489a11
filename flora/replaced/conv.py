"""Convolutions with a replaced weight, of one, two and three dimensions, with any number of groups."""

from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from flora.replaced.bases import unpacks
from flora.replaced.layer import ReplacedLayer
from flora.replaced.linear import runs_plain_op
from flora.replaced.weights import AdaptedWeight, ModeKind, plain

_PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def conv_modes(base: Any, output_dim: int) -> AdaptedWeight:
    """The weight of a convolution with two channel modes and a mode per dimension of the kernel."""
    kernel: list[ModeKind] = ["kernel"] * len(base.kernel_size)
    # A quantised layer may store its weight in another shape.
    channels = (base.out_channels, base.in_channels)
    shape = (channels[output_dim], channels[1 - output_dim] // base.groups, *base.kernel_size)
    return plain("weight", shape, ["channel", "channel", *kernel], output_dim=output_dim)


class ReplacedConv(ReplacedLayer):
    """nn.Conv1d, nn.Conv2d or nn.Conv3d, weight [out, in/groups, kernel...], and subclasses with their own forward."""

    takes_adapter_names = True

    @override
    def describe_weights(self, config: Any, name: str) -> list[AdaptedWeight]:
        return [conv_modes(self.get_base_layer(), output_dim=0)]

    @property
    def plain_op(self) -> bool:
        """Whether the layer's class does nothing but the convolution, and at most unpacks its weight for it."""
        base = self.get_base_layer()
        kind = _PLAIN[len(base.kernel_size)]
        no_own_forward = type(base).forward is kind.forward or unpacks(base, "weight")
        return no_own_forward and type(base)._conv_forward is kind._conv_forward

    @override
    def run_base(self, weights: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self._modules["base_layer"]  # past nn.Module's attribute lookup
        if runs_plain_op(base, _PLAIN[len(base.kernel_size)]):
            bias = weights.get("bias", base.bias)
            return base._conv_forward(*args, **kwargs, weight=weights["weight"], bias=bias)
        return super().run_base(weights, *args, **kwargs)
