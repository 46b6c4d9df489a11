"""Batch norms that stand still: a scale and a shift, of which a backward pass needs the scale alone.

torch keeps the input of such a norm for a backward pass that does not read it. Here nothing of its size is kept, so
that a network of convolutions keeps little more than half of its activations; and the gradient is scaled by the kernel
of the forward pass, where torch takes a slower one and, in channels-last order, a copy.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from flora.training.internals import BatchNorm, check_dimensions, transformed, written


class Scaling:
    """Inside, norms that are in eval mode run as a scale and a shift; those of a kind unknown here as they are.

    It is entered at each step, and left after it: between steps callbacks may copy, save or script the network.
    """

    def __init__(self, norms: Iterable[nn.Module]) -> None:
        self._forwards = [_Still(norm, then) for norm in norms if (then := _after(norm))]

    def __enter__(self) -> None:
        # Computed at each step, and so in each replay of a captured one: what is written to a norm between steps
        # counts, through ``.data`` too, which no version tells of.
        alike: dict[tuple[object, ...], list[_Still]] = {}
        for forward in self._forwards:
            alike.setdefault(forward.look(), []).append(forward)
        for forwards in alike.values():
            _scale(forwards)
        for forward in self._forwards:
            forward.norm.__dict__.setdefault("forward", forward)

    def __exit__(self, *error: object) -> None:
        for forward in self._forwards:
            if forward.norm.__dict__.get("forward") is forward:
                del forward.norm.__dict__["forward"]


def of(model: nn.Module) -> list[nn.Module]:
    """The batch norms of a network of which nothing trains."""
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    return [norm for norm in norms if not any(parameter.requires_grad for parameter in norm.parameters())]


def _after(norm: Any) -> Callable[[Tensor], Tensor] | None:
    """What a norm does after it has normalised; None for a kind of which that is not known."""
    if norm.running_mean is None or "forward" in norm.__dict__:
        return None
    if type(norm).forward is BatchNorm.forward:
        return _nothing
    if type(norm) is BatchNormAct2d:
        return lambda output: norm.act(norm.drop(output))
    return None


def _nothing(output: Tensor) -> Tensor:
    return output


class _Still:
    """The forward pass of a norm."""

    def __init__(self, norm: Any, then: Callable[[Tensor], Tensor]) -> None:
        self.norm, self.then = norm, then
        self.scale: Tensor
        self.zeros = self.halves = torch.empty(0)

    def __call__(self, input: Tensor) -> Tensor:
        norm = self.norm
        if norm.training or not (torch.is_grad_enabled() and input.requires_grad):
            return type(norm).forward(norm, input)
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed():  # they take torch's own operations
            return type(norm).forward(norm, input)
        trained = [norm.weight, norm.bias]
        if any(parameter is not None and parameter.requires_grad for parameter in trained):
            return type(norm).forward(norm, input)
        check_dimensions(norm, input)
        still = norm.running_mean, norm.running_var, *trained, norm.eps
        return self.then(_Normalised.apply(input, *self.scales(), *still))

    def scales(self) -> tuple[Tensor, Tensor, Tensor]:
        """What an input is multiplied with, by channel ``[C]``, zeros and halves; anew where the norm's numbers are."""
        weight, variance, *versions = self.weight, self.variance, *self.versions
        self.look()
        if weight is not self.weight or variance is not self.variance or versions != self.versions:
            _scale([self])
        return self.scale, self.zeros, self.halves

    def look(self) -> tuple[object, ...]:
        """Take up the norm's tensors; their kind."""
        norm = self.norm
        self.weight, self.variance = weight, variance = norm.weight, norm.running_var
        self.versions = [0 if weight is None else written(weight), written(variance)]
        return variance.device, variance.dtype, None if weight is None else weight.dtype, norm.eps


@torch.no_grad()
def _scale(alike: Sequence[_Still]) -> None:
    """Of norms of one kind, all of them in a few operations.

    At least in float32, as torch's kernels compute it: rounded to bf16 it would bias a whole channel.
    """
    variances = torch.cat([still.variance for still in alike])
    scale = 1 / torch.sqrt(variances.to(torch.promote_types(variances.dtype, torch.float32)) + alike[0].norm.eps)
    if alike[0].weight is not None:
        scale = scale * torch.cat([still.weight for still in alike])
    for still, part in zip(alike, scale.split([len(still.variance) for still in alike]), strict=True):
        still.scale, zeros = part, still.zeros
        if (zeros.shape, zeros.dtype, zeros.device) != (part.shape, part.dtype, part.device):
            still.zeros, still.halves = torch.zeros_like(part), torch.full_like(part, 0.5)


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        scale: Tensor,
        zeros: Tensor,
        halves: Tensor,
        mean: Tensor,
        variance: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(scale, zeros, halves)
        return F.batch_norm(input, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scale, zeros, halves = ctx.saved_tensors
        # A variance of 1/2 and an epsilon of 1/2 divide by one, exactly; torch 2.11 refuses an epsilon of 0.
        scaled = F.batch_norm(gradient, zeros, halves, scale, zeros, False, 0.0, 0.5)
        return scaled, *[None] * 8
