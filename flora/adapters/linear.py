"""Adapted matrices: linear layers (also transformers' Conv1D) and embeddings."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from flora.adapters.config import FloraConfig
from flora.adapters.fast.cost import Work, additive_is_cheaper
from flora.adapters.layer import FloraLayer, compute_dtype, in_transform
from flora.adapters.tucker import to_tensor
from flora.adapters.weights import AdaptedWeight, plain


def runs_plain_op(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the layer is nothing but the op of ``kind``: no forward of its own, no hooks."""
    own = "forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks
    watched = layer._backward_hooks or layer._backward_pre_hooks
    return type(layer).forward is kind.forward and not own and not watched


class _Matrix(FloraLayer):
    """A layer with one weight matrix, whose update is a product of two thin matrices."""

    def matrix_factors(self, adapter: str, core_side: str) -> tuple[Tensor, Tensor] | None:
        """Thin matrices L (rows x k) and R (k x columns) with L R = update, the core multiplied into one side.

        Args:
            adapter: its name.
            core_side: ``rows`` or ``columns``, the side to take the core.

        Returns:
            L and R, or ``None`` where a fold leaves several modes on the other side.
        """
        described = self.weights[adapter]["weight"]
        split = _split(described)
        other = range(split, len(described.shape)) if core_side == "rows" else range(split)
        if split == 0 or len(other) != 1:
            return None
        core = self.core(adapter) * self.scaling[adapter]
        factors = self.factors(adapter)
        single = factors[other[0]]
        thin = core.new_ones(1, 1) if single is None else single
        taken = to_tensor(core, [None if mode in other else factor for mode, factor in enumerate(factors)])
        if core_side == "rows":
            return taken.reshape(described.weight_shape[0], -1), thin.mT
        return thin, taken.reshape(-1, described.weight_shape[1])

    def core_side(self, adapter: str) -> str:
        """The side that takes the core: the only one that can, else the smaller."""
        described = self.weights[adapter]["weight"]
        split = _split(described)
        if split != 1:
            return "rows"
        if len(described.shape) - split != 1:
            return "columns"
        return "rows" if described.weight_shape[0] < described.weight_shape[1] else "columns"

    @override
    def can_add(self, adapter_name: str) -> bool:
        described = self.weights[adapter_name]["weight"]
        split = _split(described)
        return split > 0 and 1 in (split, len(described.shape) - split)


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


def _split(described: AdaptedWeight) -> int:
    """Number of leading modes that make up the rows of the matrix; 0 if no boundary of modes falls there."""
    size = 1
    for mode, mode_size in enumerate(described.shape):
        size *= mode_size
        if size == described.weight_shape[0]:
            return mode + 1 if mode + 1 < len(described.shape) else 0
    return 0


class Linear(_Matrix):
    """A linear layer: nn.Linear (weight [out, in]) or transformers' Conv1D (weight [in, out])."""

    @property
    @override
    def stackable(self) -> bool:  # type: ignore[override]
        base = self.get_base_layer()
        return runs_plain_op(base, nn.Linear) or runs_plain_op(base, Conv1D)

    @override
    def describe_weights(self, config: FloraConfig, name: str) -> list[AdaptedWeight]:
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
    def can_add(self, adapter_name: str) -> bool:
        base = self.get_base_layer()
        # An unknown forward may do more to its weight than multiply by it; a quantised weight leaves no choice.
        known = isinstance(base, Conv1D) or type(base).forward is nn.Linear.forward or self._weight_is_elsewhere()
        return known and super().can_add(adapter_name)

    @override
    def prefers_adding(self, adapter_name: str) -> bool:
        described, ranks = self.weights[adapter_name]["weight"], self.effective_ranks[adapter_name]["weight"]
        weight = self.base_weight("weight")
        rows, columns = described.weight_shape
        return additive_is_cheaper(
            Work(columns, rows, min(ranks), min(ranks)), weight.device.type, compute_dtype(weight)
        )

    @override
    def run_additive(self, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        plain_input = len(args) == 1 and not kwargs and args[0].dim() >= 2
        if len(adapters) > 1 or not plain_input or not self._runs_fused(adapters[0]) or in_transform():
            return super().run_additive(adapters, *args, **kwargs)
        thin = self.matrix_factors(adapters[0], self.core_side(adapters[0]))
        assert thin is not None
        left, right = thin
        return self._fused(args[0], left, right, compute_dtype(self.base_layer.weight))

    @override
    def thin_side(self, adapter_name: str) -> str | None:
        described, held = self.weights[adapter_name]["weight"], self.tucker_factors[adapter_name]
        alike = not described.folded and len(held) == len(described.shape) == 2
        return self.core_side(adapter_name) if alike and self._runs_fused(adapter_name) else None

    @override
    def run_built(self, built: Any, *args: Any, **kwargs: Any) -> Tensor:
        dtype = built["weight"].dtype if isinstance(built, dict) else built[0].dtype
        plain_input = len(args) == 1 and not kwargs
        if plain_input:
            args = (self.batched().converted(args[0], dtype),)
        if isinstance(built, dict):
            return super().run_built(built, *args, **kwargs)
        left, right = built
        if plain_input and args[0].dim() >= 2:
            return self._fused(args[0], left, right, dtype)
        return self.run_additive(self._present(self.active_adapters), *args, **kwargs)

    def _runs_fused(self, adapter: str) -> bool:
        """Whether base layer and update can run in one op: a frozen nn.Linear at hand, and no dropout."""
        base, dropped = self.base_layer, isinstance(self.tucker_dropout[adapter], nn.Dropout) and self.training
        if dropped or not runs_plain_op(base, nn.Linear) or self._weight_is_elsewhere():
            return False
        return type(base.weight) is nn.Parameter and not base.weight.requires_grad and not base.weight.is_meta

    def _fused(self, input: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        return _LinearPlusThin.apply(input, self.base_layer.weight, self.base_layer.bias, left, right, dtype)

    @override
    def delta_output(self, adapter_name: str, input: Tensor) -> Tensor:
        thin = self.matrix_factors(adapter_name, self.core_side(adapter_name))
        assert thin is not None
        left, right = (part.to(input.dtype) for part in thin)
        input = self.tucker_dropout[adapter_name](input)
        if isinstance(self.get_base_layer(), Conv1D):
            return input @ left @ right
        return F.linear(F.linear(input, right), left)

    @override
    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return adapter_name not in self.tucker_magnitude  # what PEFT's convert_to_lora may read as a sum


class Embedding(_Matrix):
    """An embedding: a true [vocabulary, dimension] update, of which only the rows in use are computed."""

    @override
    def describe_weights(self, config: FloraConfig, name: str) -> list[AdaptedWeight]:
        shape = self.get_base_layer().weight.shape
        return [plain("weight", shape, ("channel", "channel"), output_dim=1)]

    @override
    def can_add(self, adapter_name: str) -> bool:
        base = self.get_base_layer()
        # max_norm renormalises rows of the sum, scale_grad_by_freq divides gradients of its rows; scaled embeddings
        # multiply it by a constant, which can be applied here.
        known = type(base).forward is nn.Embedding.forward or self._get_embed_scale() is not None
        additive = base.max_norm is None and not base.scale_grad_by_freq
        return known and additive and super().can_add(adapter_name)

    @override
    def prefers_adding(self, adapter_name: str) -> bool:
        return True  # only the rows in use are computed

    @override
    def delta_output(self, adapter_name: str, input: Tensor) -> Tensor:
        base = self.get_base_layer()
        side = "columns" if _split(self.weights[adapter_name]["weight"]) == 1 else "rows"
        thin = self.matrix_factors(adapter_name, side)
        assert thin is not None
        left, right = thin
        output = self.tucker_dropout[adapter_name](F.embedding(input, left)) @ right
        if base.padding_idx is not None:  # its row is not trained, nor by it what it shares with others
            output = torch.where((input == base.padding_idx).unsqueeze(-1), output.detach(), output)
        scale = self._get_embed_scale()
        return output if scale is None else output * scale.to(output.dtype)
