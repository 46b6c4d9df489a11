"""FLoRA of convolutions of one, two and three dimensions, plain and transposed, with any number of groups."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from flora.adapters.config import FloraConfig
from flora.adapters.cost import Work, factored_is_cheaper
from flora.adapters.layer import FloraLayer
from flora.adapters.tucker import to_tensor
from flora.replaced import stand_in
from flora.replaced.bases import stored, unpacks
from flora.replaced.conv import ReplacedConv, conv_modes
from flora.replaced.layer import Form
from flora.replaced.linear import runs_plain_op
from flora.replaced.precision import compute_dtype
from flora.replaced.weights import AdaptedWeight

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class _Conv(FloraLayer):
    """What plain and transposed convolutions share: modes, and an update that runs as pointwise, core, pointwise."""

    takes_adapter_names = True
    output_dim = 0

    @override
    def describe_weights(self, config: FloraConfig, name: str) -> list[AdaptedWeight]:
        return [conv_modes(self.get_base_layer(), self.output_dim)]

    @property
    @override
    def stackable(self) -> bool:  # type: ignore[override]
        # A forward of the layer's own, put there later, takes the weight in its own dtype.
        return self.plain_op and "forward" not in vars(self.get_base_layer())

    @override
    def form_apart(self, adapter_name: str) -> Form | None:
        base = self.get_base_layer()
        if self.plain_op:
            # Groups share the input factor but not the channels it acts on: no thin product, so the update runs dense.
            one_product = base.groups == 1 and not self.weights[adapter_name]["weight"].folded
            return "factored" if one_product else "dense"
        # timm's Conv2dSame pads by the size of its input, as TensorFlow does; other unknown forwards may be anything.
        return "dense" if type(base).__name__ == "Conv2dSame" else None

    @override
    def cheaper_form(self, adapter_name: str) -> Form:
        base = self.get_base_layer()
        if self.form_apart(adapter_name) != "factored":
            return "merged"
        ranks, strides = self.effective_ranks[adapter_name]["weight"], math.prod(base.stride)
        work = Work(
            base.in_channels,
            base.out_channels,
            ranks[1 - self.output_dim],
            ranks[self.output_dim],
            kernel=math.prod(base.kernel_size),
            inputs_per_output=1 / strides if self.output_dim == 1 else strides,
        )
        weight = stored(base, "weight")
        cheaper = factored_is_cheaper(work, weight.device.type, compute_dtype(weight))
        return "factored" if cheaper else "merged"

    @override
    def delta_output(self, adapter_name: str, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        input = self.drop(adapter_name, input)
        if self.form_apart(adapter_name) == "dense":
            return self._op(input, *args, weight=self.get_delta_weight(adapter_name).to(input.dtype), **kwargs)
        factors = self.factors(adapter_name)
        kernel = to_tensor(self.core(adapter_name) * self.scaling[adapter_name], [None, None, *factors[2:]])
        inward, outward = factors[1 - self.output_dim], factors[self.output_dim]
        hidden = input if inward is None else self._pointwise(input, inward.T)
        hidden = self._op(hidden, *args, weight=kernel.to(input.dtype), **kwargs)
        return hidden if outward is None else self._pointwise(hidden, outward)

    def _pointwise(self, input: Tensor, matrix: Tensor) -> Tensor:
        dims = len(self.get_base_layer().kernel_size)
        return _CONV[dims](input, matrix.reshape(*matrix.shape, *[1] * dims).to(input.dtype))

    @property
    def plain_op(self) -> bool:
        """Whether the layer's class does nothing but the convolution."""
        raise NotImplementedError

    def _op(self, input: Tensor, *args: Any, weight: Tensor, **kwargs: Any) -> Tensor:
        """The base layer's op with another weight, without its bias."""
        raise NotImplementedError


class ConvNd(ReplacedConv, _Conv):
    """nn.Conv1d, nn.Conv2d or nn.Conv3d, weight [out, in/groups, kernel...], and subclasses with their own forward."""

    @override
    def _op(self, input: Tensor, *, weight: Tensor) -> Tensor:  # type: ignore[override]
        base = self.get_base_layer()
        if self.plain_op:
            return base._conv_forward(input, weight, None)
        swapped = {"weight": weight} if base.bias is None else {"weight": weight, "bias": torch.zeros_like(base.bias)}
        return stand_in.run_alone(base, swapped, input)  # whose hooks have run for W


class ConvTransposeNd(_Conv):
    """nn.ConvTranspose1d, 2d or 3d, weight [in, out/groups, kernel...]."""

    output_dim = 1

    @override
    def check_config(self, config: FloraConfig, name: str) -> None:
        super().check_config(config, name)
        if config.use_dora and self.get_base_layer().groups > 1:
            raise ValueError(
                f"use_dora: {name} is a grouped transposed convolution, whose outputs share rows; not supported"
            )

    @property
    @override
    def plain_op(self) -> bool:
        base = self.get_base_layer()
        return type(base).forward is _TRANSPOSED[len(base.kernel_size)].forward or unpacks(base, "weight")

    @override
    def run_base(self, weights: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self._modules["base_layer"]  # past nn.Module's attribute lookup
        if runs_plain_op(base, _TRANSPOSED[len(base.kernel_size)]):
            return self._op(*args, **kwargs, weight=weights["weight"], bias=weights.get("bias", base.bias))
        return super().run_base(weights, *args, **kwargs)

    @override
    def _op(  # type: ignore[override]
        self, input: Tensor, output_size: list[int] | None = None, *, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        base = self.get_base_layer()
        dims = len(base.kernel_size)
        padding = base._output_padding(
            input, output_size, base.stride, base.padding, base.kernel_size, dims, base.dilation
        )
        return _CONV_TRANSPOSE[dims](
            input, weight, bias, base.stride, base.padding, padding, base.groups, base.dilation
        )
