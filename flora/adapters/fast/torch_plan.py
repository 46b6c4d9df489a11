"""Weights built stack by stack, in batched matrix products: on any device, in any dtype."""

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from flora.adapters.fast.plan import Plan, Stack


class TorchPlan(Plan):
    """A plan whose stacks are built one after the other.

    Attributes:
        columns: per stack, the size of what its rows are multiplied with.
    """

    def __init__(self, stacks: Sequence[Stack]) -> None:
        super().__init__(stacks)
        self.columns = [len(s.layers) * s.ranks[s.modes[0]] * math.prod(s.sizes(s.modes[1:])) for s in self.stacks]

    @override
    def merge(self, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return _Build.apply(self, *parameters)

    def small_products(self, blocks: Sequence[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
        """Per family, cores as [n, r_1 * r_wide, r_small], Kronecker products of small factors [n, small, r_small]."""
        products = []
        for members in self.families:
            first, core = members[0], blocks[self.index[members[0], None]]
            core = core.permute(0, *(1 + mode for mode in first.core_order))
            small = math.prod(first.ranks[mode] for mode in first.small)
            core = core.reshape(len(core), -1, small)
            kronecker = None
            for mode in first.small:
                factor = blocks[self.index[first, mode]]
                if kronecker is None:
                    kronecker = factor
                else:
                    product = kronecker[:, :, None, :, None] * factor[:, None, :, None, :]
                    kronecker = product.flatten(3).flatten(1, 2)
            products.append((core, kronecker))
        return products

    def cores_back(self, stack: Stack, gradient: Tensor) -> Tensor:
        """The inverse of the rearrangement of cores in ``small_products``."""
        turned = gradient.reshape(len(gradient), *(stack.ranks[mode] for mode in stack.core_order))
        return turned.permute(0, *(1 + stack.core_order.index(mode) for mode in range(len(stack.ranks))))

    def factors_back(self, members: tuple[Stack, ...], blocks: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
        """Gradients of the small factors from that of their Kronecker product."""
        first = members[0]
        factors = [blocks[self.index[first, mode]] for mode in first.small]
        if len(factors) == 1:
            return [gradient]
        modes = gradient.view(len(gradient), *first.sizes(first.small), *(first.ranks[mode] for mode in first.small))
        letters = "abcde"[: len(factors)], "vwxyz"[: len(factors)]
        gradients = []
        for i in range(len(factors)):
            others = [f"n{d}{r}" for k, (d, r) in enumerate(zip(*letters, strict=True)) if k != i]
            equation = ",".join([f"n{letters[0]}{letters[1]}", *others])
            rest = [factor for k, factor in enumerate(factors) if k != i]
            gradients.append(torch.einsum(f"{equation}->n{letters[0][i]}{letters[1][i]}", modes, *rest))
        return gradients


class _Build(torch.autograd.Function):
    """The weights of all layers of a plan from their cores and factors."""

    @staticmethod
    def forward(ctx: Any, plan: TorchPlan, *parameters: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(parameters[0].device.type, enabled=False):
            flat = torch._C._nn.flatten_dense_tensors(list(parameters))
            blocks = plan.split(flat)
            products, turned = plan.small_products(blocks), []
            weights: list[Tensor] = []
            columns = flat.new_empty(sum(plan.columns))  # what the rows are multiplied with, of all stacks
            right = iter(_split_columns(plan, columns))
            for members, (core, kronecker) in zip(plan.families, products, strict=True):
                inner = core if kronecker is None else core @ kronecker.mT
                for stack, part in zip(members, inner.split([len(s.layers) for s in members]), strict=True):
                    place = next(right)
                    turned.append(_turn(stack, part))
                    if stack.wide is None:
                        place.copy_(part)
                    else:
                        _to_columns(stack, turned[-1], blocks[plan.index[stack, stack.wide]], place)
                    weights.extend(_add(stack, blocks[plan.index[stack, stack.modes[0]]], place))
            ctx.plan, ctx.flat, ctx.products, ctx.turned, ctx.columns = plan, flat, products, turned, columns
            ctx.save_for_backward(*parameters)
            ctx.set_materialize_grads(False)
            return tuple(weights)

    @staticmethod
    def backward(ctx: Any, *received: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: TorchPlan = ctx.plan
        if all(gradient is None for gradient in received):
            return (None,) * len(ctx.needs_input_grad)
        gradients = plan.given(received)
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted, which the fast path below does not record
            return None, *plan.wanted(plan.differentiable_gradients(ctx.saved_tensors, gradients), received)
        with torch.autocast(gradients[0].device.type, enabled=False):
            exact = ctx.flat.dtype
            blocks = {exact: plan.split(ctx.flat)}
            right, turned = {}, {}
            for dtype in {stack.dtype for stack in plan.stacks}:  # in which weights have their gradients
                blocks[dtype] = plan.split(ctx.flat.to(dtype))
                right[dtype] = _split_columns(plan, ctx.columns.to(dtype))
                turned[dtype] = _in_one_dtype(list(ctx.turned), dtype)
            to_blocks: list[Any] = [None] * len(plan.blocks)
            given, number = iter(gradients), iter(range(len(plan.stacks)))
            for members, (core, kronecker) in zip(plan.families, ctx.products, strict=True):
                to_inner = []
                for stack in members:
                    dtype, i = stack.dtype, next(number)
                    gradient = gather(stack, list(islice(given, len(stack.layers))))
                    rows = plan.index[stack, stack.modes[0]]
                    to_blocks[rows] = gradient @ right[dtype][i].mT
                    gradient = _from_columns(stack, blocks[dtype][rows].mT @ gradient)
                    if stack.wide is not None:
                        wide = plan.index[stack, stack.wide]
                        to_blocks[wide] = gradient.mT @ turned[dtype][i]
                        gradient = gradient @ blocks[dtype][wide]
                    to_inner.append(_turn_back(stack, gradient))
                inner, first = to_inner[0] if len(to_inner) == 1 else torch.cat(to_inner), members[0]
                if kronecker is not None:
                    inner = inner.to(exact)
                    small = plan.factors_back(members, blocks[exact], inner.mT @ core)
                    for mode, factor in zip(first.small, small, strict=True):
                        to_blocks[plan.index[first, mode]] = factor
                    inner = inner @ kronecker
                to_blocks[plan.index[first, None]] = plan.cores_back(first, inner)
            scales = [block.stacks[0].scale for block in plan.blocks]
            if set(scales) != {1.0}:
                to_blocks = [part * scale for part, scale in zip(to_blocks, scales, strict=True)]
            flat = torch._C._nn.flatten_dense_tensors(_in_one_dtype(to_blocks, exact))
            return None, *plan.wanted(torch._C._nn.unflatten_dense_tensors(flat, ctx.saved_tensors), received)


def _in_one_dtype(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in one dtype, all that differ from it converted at once."""
    for other in {tensor.dtype for tensor in tensors} - {dtype}:
        places = [i for i, tensor in enumerate(tensors) if tensor.dtype == other]
        chosen = [tensors[i] for i in places]
        flat = torch._C._nn.flatten_dense_tensors(chosen).to(dtype)
        for i, tensor in zip(places, torch._C._nn.unflatten_dense_tensors(flat, chosen), strict=True):
            tensors[i] = tensor
    return tensors


def _split_columns(plan: TorchPlan, flat: Tensor) -> list[Tensor]:
    """Per stack [n, r_1, rest], views of a flat buffer."""
    parts = zip(plan.stacks, flat.split_with_sizes(plan.columns), strict=True)
    return [part.view(len(stack.layers), stack.ranks[stack.modes[0]], -1) for stack, part in parts]


def gather(stack: Stack, weights: Sequence[Tensor]) -> Tensor:
    """The inverse of ``unstack``, copied: [n, rows, rest] in memory order."""
    ordered = weights if stack.in_order else [weight.permute(stack.order) for weight in weights]
    return torch.stack(list(ordered)).reshape(len(weights), stack.described.shape[stack.modes[0]], -1)


def _add(stack: Stack, left: Tensor, right: Tensor) -> Sequence[Tensor]:
    """Base weights plus ``scale`` times the products [n, rows, r] x [n, r, rest], rounded once, to ``dtype``."""
    bases = [layer.base_layer._parameters["weight"] for layer in stack.layers]
    sums = left @ (right if stack.scale == 1 else right * stack.scale)
    torch._foreach_add_(list(stack.unstack(sums)), bases)
    return stack.unstack(sums.to(stack.dtype))


def _turn(stack: Stack, inner: Tensor) -> Tensor:
    """[n, r_1 * r_wide, small] to [n, r_1 * small, r_wide]."""
    if stack.wide is None or not stack.small:
        return inner.view(len(inner), stack.ranks[stack.modes[0]], -1)
    n, rank = len(inner), stack.ranks[stack.wide]
    return inner.view(n, stack.ranks[stack.modes[0]], rank, -1).transpose(2, 3).reshape(n, -1, rank)


def _turn_back(stack: Stack, turned: Tensor) -> Tensor:
    """The inverse of ``turn``."""
    n, first = len(turned), stack.ranks[stack.modes[0]]
    if stack.wide is None or not stack.small:
        return turned.reshape(n, -1, 1)
    rank = stack.ranks[stack.wide]
    return turned.view(n, first, -1, rank).transpose(2, 3).reshape(n, first * rank, -1)


def _to_columns(stack: Stack, turned: Tensor, factor: Tensor, out: Tensor) -> None:
    """[n, r_1 * small, r_wide] times the factor [n, wide, r_wide], into [n, r_1, rest] in memory order."""
    n, first = len(turned), stack.ranks[stack.modes[0]]
    order = (*stack.small, stack.wide)
    if stack.modes[1:] == order:
        torch.bmm(turned, factor.mT, out=out.view(n, -1, factor.shape[1]))
        return
    product = (turned @ factor.mT).view(n, first, *stack.sizes(order))  # type: ignore[arg-type]
    places = [2 + order.index(mode) for mode in stack.modes[1:]]
    out.view(n, first, *stack.sizes(stack.modes[1:])).copy_(product.permute(0, 1, *places))


def _from_columns(stack: Stack, gradient: Tensor) -> Tensor:
    """[n, r_1, rest] in memory order to [n, r_1 * small, wide]."""
    n, first = len(stack.layers), stack.ranks[stack.modes[0]]
    if stack.wide is None:
        return gradient
    order = (*stack.small, stack.wide)
    if stack.modes[1:] != order:
        places = [2 + stack.modes[1:].index(mode) for mode in order]
        gradient = gradient.view(n, first, *stack.sizes(stack.modes[1:])).permute(0, 1, *places)
    return gradient.reshape(n, -1, stack.described.shape[stack.wide])
