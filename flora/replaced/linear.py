"""Linear layers with a replaced weight: nn.Linear and transformers' Conv1D, merged or by two thin matrices."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from flora.replaced.layer import Form, ReplacedLayer, compute_dtype, in_transform
from flora.replaced.weights import AdaptedWeight, plain


def runs_plain_op(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the layer is nothing but the op of ``kind``: no forward of its own, no hooks."""
    own = "forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks
    watched = layer._backward_hooks or layer._backward_pre_hooks
    return type(layer).forward is kind.forward and not own and not watched


class _LinearPlusThin(torch.autograd.Function):
    """x W^T + b + (x R^T) L^T, the second product added in place; keeps x once, in the compute dtype."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype
    ) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            x = input.to(dtype)
            flat, matrix, thin = x.flatten(0, -2), weight.to(dtype), right.to(dtype)
            hidden = flat @ thin.mT
            output = F.linear(flat, matrix, None if bias is None else bias.to(dtype))
            output.addmm_(hidden, left.to(dtype).mT)
            ctx.save_for_backward(x, matrix, left, right, hidden)
            ctx.dtypes = input.dtype, None if bias is None else bias.dtype
            return output.unflatten(0, input.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, matrix, left, right, hidden = ctx.saved_tensors
        input_dtype, bias_dtype = ctx.dtypes
        if torch.is_grad_enabled() and input_dtype != x.dtype:
            raise RuntimeError("a second gradient through a factored layer needs its input in the compute dtype")
        wanted = ctx.needs_input_grad
        with torch.autocast(x.device.type, enabled=False):
            flat, out, thin = x.flatten(0, -2), gradient.flatten(0, -2), right.to(x.dtype)
            if torch.is_grad_enabled():
                hidden = flat @ thin.mT  # kept from the forward pass without its graph
            inner = out @ left.to(x.dtype)
            to_input = (out @ matrix).addmm(inner, thin).reshape(x.shape).to(input_dtype) if wanted[0] else None
            to_bias = out.sum(0).to(bias_dtype) if wanted[2] else None
            to_left = (out.mT @ hidden).to(left.dtype) if wanted[3] else None
            to_right = (inner.mT @ flat).to(right.dtype) if wanted[4] else None
        return to_input, None, to_bias, to_left, to_right, None


class ReplacedLinear(ReplacedLayer):
    """A linear layer: nn.Linear (weight [out, in]) or transformers' Conv1D (weight [in, out])."""

    takes_adapter_names = True

    def thin_matrices(self, adapter: str) -> tuple[Tensor, Tensor]:
        """L (rows x k) and R (k x columns) with L R = update, its scale included; defined where there is a form apart.

        Rows and columns are those of the stored weight.
        """
        raise NotImplementedError

    @override
    def describe_weights(self, config: Any, name: str) -> list[AdaptedWeight]:
        base = self.get_base_layer()
        if isinstance(base, Conv1D):
            return [plain("weight", base.weight.shape, ("channel", "channel"), output_dim=1)]
        # A quantised layer stores its weight in another shape.
        return [plain("weight", (base.out_features, base.in_features), ("channel", "channel"))]

    @override
    def run_base(self, weights: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self._modules["base_layer"]  # past nn.Module's attribute lookup
        if runs_plain_op(base, nn.Linear):
            return F.linear(args[0] if args else kwargs["input"], weights["weight"], weights.get("bias", base.bias))
        return super().run_base(weights, *args, **kwargs)

    @override
    def form_apart(self, adapter_name: str) -> Form | None:
        base = self.get_base_layer()
        # An unknown forward may do more to its weight than multiply by it; a quantised weight leaves no choice.
        op_known = isinstance(base, Conv1D) or type(base).forward is nn.Linear.forward or self._weight_is_elsewhere()
        return "factored" if op_known else None

    @override
    def run_apart(self, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        plain_input = len(args) == 1 and not kwargs and args[0].dim() >= 2
        if len(adapters) > 1 or not plain_input or not self.runs_fused(adapters[0]) or in_transform():
            return super().run_apart(adapters, *args, **kwargs)
        left, right = self.thin_matrices(adapters[0])
        return self.run_fused(args[0], left, right, compute_dtype(self.base_layer.weight))

    def runs_fused(self, adapter: str) -> bool:
        """Whether base layer and update can run in one op: a frozen nn.Linear at hand, and no dropout."""
        base = self.base_layer
        if self.drops(adapter) or not runs_plain_op(base, nn.Linear) or self._weight_is_elsewhere():
            return False
        return type(base.weight) is nn.Parameter and not base.weight.requires_grad and not base.weight.is_meta

    def run_fused(self, input: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        """Base layer and update in one op, in ``dtype``."""
        return _LinearPlusThin.apply(input, self.base_layer.weight, self.base_layer.bias, left, right, dtype)

    @override
    def delta_output(self, adapter_name: str, input: Tensor) -> Tensor:
        left, right = (part.to(input.dtype) for part in self.thin_matrices(adapter_name))
        input = self.drop(adapter_name, input)
        if isinstance(self.get_base_layer(), Conv1D):
            return input @ left @ right
        return F.linear(F.linear(input, right), left)

    @override
    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return adapter_name not in self.tucker_magnitude  # what PEFT's convert_to_lora may read as a sum
