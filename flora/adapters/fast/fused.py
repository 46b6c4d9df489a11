"""A linear layer and its thin update in one op."""

from typing import Any

import torch
from torch import Tensor, nn

from flora.replaced.precision import full_precision


def linear_plus_thin(base: nn.Linear, input: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """A linear layer and the update ``left @ right`` of its weight in one op, in ``dtype``."""
    if not torch.is_grad_enabled():  # the same operations, without what recording them costs
        return _sum(input, base.weight, base.bias, left, right, dtype)[0]
    return _LinearPlusThin.apply(input, base.weight, base.bias, left, right, dtype)


def _sum(
    input: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x W^T + b + (x R^T) L^T; and x, W and x R^T in ``dtype``."""
    with full_precision(input.device):
        x = input.to(dtype)
        flat, matrix, thin = x.flatten(0, -2), weight.to(dtype), right.to(dtype)
        hidden = flat @ thin.mT
        # Not a view: torch forbids to change a view that such a function returns in place (ReLU(inplace=True)).
        output = flat.new_empty(*input.shape[:-1], len(matrix))
        rows = output.view(-1, len(matrix))
        if bias is None:
            torch.mm(flat, matrix.T, out=rows)
        else:
            torch.addmm(bias.to(dtype), flat, matrix.T, out=rows)
        rows.addmm_(hidden, left.to(dtype).mT)
        return output, x, matrix, hidden


class _LinearPlusThin(torch.autograd.Function):
    """x W^T + b + (x R^T) L^T, the second product added in place; keeps x once, in the compute dtype."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype
    ) -> Tensor:
        output, x, matrix, hidden = _sum(input, weight, bias, left, right, dtype)
        ctx.save_for_backward(x, matrix, left, right, hidden)
        ctx.dtypes = input.dtype, None if bias is None else bias.dtype
        return output

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
