"""Batch norms that stand still: a scale and a shift, of which a backward pass needs the scale alone.

torch keeps the input of such a norm for a backward pass that does not read it. Here nothing of its size is kept, so
that a network of convolutions keeps little more than half of its activations; and the gradient is scaled by the kernel
of the forward pass, where torch takes a slower one and, in channels-last order, a copy.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from flora.training.internals import BatchNorm, check_dimensions, transformed

_KNOWN = (BatchNorm.forward, BatchNormAct2d.forward)  # of which it is known what they do, as they were imported


class Scaling:
    """Inside, norms that are in eval mode run as a scale and a shift; those of a kind unknown here as they are.

    It is entered at each step, and left after it: between steps callbacks may copy, save or script the network.
    """

    def __init__(self, norms: Iterable[nn.Module]) -> None:
        self._forwards = [_Still(norm) for norm in norms]

    def __enter__(self) -> None:
        for forward in self._forwards:
            forward.norm.__dict__.setdefault("forward", forward)

    def __exit__(self, *error: object) -> None:
        for forward in self._forwards:
            if forward.norm.__dict__.get("forward") is forward:
                del forward.norm.__dict__["forward"]


def of(model: nn.Module) -> list[nn.Module]:
    """The batch norms of a network of which nothing trains; those without parameters where not everything else does."""
    whole = all(parameter.requires_grad for parameter in model.parameters())
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    trained = {norm: [parameter.requires_grad for parameter in norm.parameters()] or [whole] for norm in norms}
    return [norm for norm in norms if not any(trained[norm])]


class _Still:
    """The forward pass of a norm. It keeps no number of the norm's, which may be written to at any time."""

    def __init__(self, norm: Any) -> None:
        self.norm = norm
        self._zeros = torch.empty(0)

    def __call__(self, input: Tensor) -> Tensor:
        norm = self.norm
        forward, weight, bias, mean = type(norm).forward, norm.weight, norm.bias, norm.running_mean
        if (
            norm.training
            or mean is None
            or forward not in _KNOWN
            or not (torch.is_grad_enabled() and input.requires_grad)
        ):
            return forward(norm, input)
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed():  # they take torch's own operations
            return forward(norm, input)
        if any(parameter is not None and parameter.requires_grad for parameter in (weight, bias)):
            return forward(norm, input)
        check_dimensions(norm, input)
        zeros, exact = self._zeros, _exact(mean)
        if (zeros.shape, zeros.dtype, zeros.device) != (mean.shape, exact, mean.device):
            zeros = self._zeros = torch.zeros_like(mean, dtype=exact)
        output = _Normalised.apply(input, zeros, mean, norm.running_var, weight, bias, norm.eps)
        return norm.act(norm.drop(output)) if forward is BatchNormAct2d.forward else output


def _exact(tensor: Tensor) -> torch.dtype:
    """At least float32, as torch's kernels on a GPU have it: a scale rounded to bf16 would bias a whole channel."""
    return torch.promote_types(tensor.dtype, torch.float32)


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        zeros: Tensor,
        mean: Tensor,
        variance: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(zeros, variance, weight)
        ctx.eps = eps
        return F.batch_norm(input, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        zeros, variance, weight = ctx.saved_tensors
        variance, weight = (None if number is None else number.to(_exact(number)) for number in (variance, weight))
        # The derivative is the norm itself without what it adds.
        scaled = F.batch_norm(gradient, zeros, variance, weight, None, False, 0.0, ctx.eps)
        return scaled, *[None] * 6
