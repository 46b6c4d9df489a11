"""Linear layers with a replaced weight: nn.Linear and transformers' Conv1D, merged or by two thin matrices."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from flora.replaced import passes
from flora.replaced.layer import Form, ReplacedLayer
from flora.replaced.precision import compute_dtype
from flora.replaced.weights import AdaptedWeight, plain


def runs_plain_op(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the layer is nothing but the op of ``kind``: no forward of its own, no hooks."""
    own = "forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks
    watched = layer._backward_hooks or layer._backward_pre_hooks or _has_any_global_hook()
    return type(layer).forward is kind.forward and not own and not watched


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
        op_known = isinstance(base, Conv1D) or type(base).forward is nn.Linear.forward or self.quantised()
        return "factored" if op_known else None

    @override
    def run_apart(self, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        shared = passes.running()
        if shared is None or len(adapters) > 1 or len(args) != 1 or kwargs or not self.runs_fused(adapters[0]):
            return super().run_apart(adapters, *args, **kwargs)
        dtype = compute_dtype(self.base_layer.weight)
        if not passes.converts(args[0], dtype):
            return super().run_apart(adapters, *args, **kwargs)
        left, right = self.thin_matrices(adapters[0])
        return shared.linear_plus_thin(self.base_layer, args[0], left, right, dtype)

    def runs_fused(self, adapter: str) -> bool:
        """Whether base layer and update can run in one op: a frozen nn.Linear at hand, and no dropout."""
        base = self.base_layer
        if self.drops(adapter) or not runs_plain_op(base, nn.Linear) or self._weight_is_elsewhere():
            return False
        weight = base._parameters.get("weight")  # a parametrised one is not computed for this
        return type(weight) is nn.Parameter and not weight.requires_grad and not weight.is_meta

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
