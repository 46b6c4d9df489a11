"""Weights built all together: each step of the contraction is one launch, or few, over all layers of a model.

With G the core, the factors of the small modes multiplied into it (``inner``), A the factor of the rows and C that of
the wide mode: columns = inner C^T, weight = base + scale A columns. Backward, D being a weight's gradient:
dA = scale D columns^T, dcolumns = scale A^T D, dinner = dcolumns C, dC = dcolumns^T inner.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from flora.adapters.kernels import Product, Products, Walk
from flora.adapters.stacks import Plan, Stack

# Rows, columns and depth of a tile, at most; a step of smaller products has smaller ones.
_TILES = {
    "columns": (16, 128, 64),
    "weights": (64, 64, 64),
    "to_left": (64, 64, 64),
    "to_columns": (64, 64, 64),
    "to_inner": (32, 64, 64),
    "to_wide": (64, 64, 64),
}


class Grouped(Plan):
    """A plan whose stacks are built together on a GPU: fp32 adapters, dense base weights with a wide mode."""

    def __init__(self, stacks: Sequence[Stack]) -> None:
        super().__init__(sorted(stacks, key=_odd))  # what follows an odd size is not aligned
        self.dtype = stacks[0].dtype
        self.layers = [layer for stack in self.stacks for layer in stack.layers]
        self.places = list(self._places())
        self.weights = sum(math.prod(shape) for shape, _, _ in self.places)
        self._inner = [self._inner_size(members) for members in self.families]
        self.inner = sum(self._inner)
        self.room = self.inner + sum(self.columns)
        found: dict[str, list[Product]] = {}
        for name, product in self._products():
            found.setdefault(name, []).append(product)
        device = self.layers[0].base_layer._parameters["weight"].device
        self._steps = {name: Products(products, _tile(name, products), device) for name, products in found.items()}

    def _places(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
        """Shape, strides and start of the layers' weights in the buffer that holds them."""
        start = 0
        for stack in self.stacks:
            modes = range(len(stack.ranks))
            shape = tuple(stack.described.weight_shape if stack.in_order else stack.sizes(modes))
            strides, step = [0] * len(shape), 1
            for mode in reversed(range(len(shape)) if stack.in_order else stack.order):
                strides[mode], step = step, step * shape[mode]
            for _ in stack.layers:
                yield shape, tuple(strides), start
                start += step

    def _inner_size(self, members: tuple[Stack, ...]) -> int:
        """Size of a family's cores with small factors multiplied in; without such, the cores are that already."""
        one = members[0]
        ranks = math.prod(one.ranks[mode] for mode in one.outer)
        return sum(len(stack.layers) for stack in members) * ranks * _small(one) if one.small else 0

    def _products(self) -> Iterator[tuple[str, Product]]:
        """The products of all steps, layer by layer."""
        blocks = list(accumulate(self._sizes, initial=0))
        inners, columns = accumulate(self._inner, initial=0), accumulate(self.columns, initial=self.inner)
        weights = (start for _, _, start in self.places)
        for members, start in zip(self.families, inners, strict=False):
            one = members[0]
            inner = start if one.small else blocks[self.index[one, None]]
            size = math.prod(one.ranks[mode] for mode in one.outer) * _small(one)
            for stack, column in zip(members, columns, strict=False):
                rows, wide = (blocks[self.index[stack, mode]] for mode in stack.outer)
                for i, weight in zip(range(len(stack.layers)), weights, strict=False):
                    left, right, row = (math.prod(shape) for shape in _factors(stack))
                    starts = rows + i * left, wide + i * right, inner, column + i * row, weight
                    yield from _steps(stack, *starts)
                    inner += size

    @override
    def build(self, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return _Build.apply(self, *parameters)

    def run(self, step: str, a: Tensor, b: Tensor, c: Tensor, bases: Sequence[Tensor] | None = None) -> None:
        """Compute a step of the contraction for all layers that have it."""
        if step in self._steps:
            self._steps[step](a, b, c, bases)

    def split_inner(self, room: Tensor, products: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        """Per family [n, r_1 * r_wide, small], views of ``room``; empty without small modes."""
        parts = room[: self.inner].split_with_sizes(self._inner)
        return [part.view(*core.shape[:2], -1) for part, (core, _) in zip(parts, products, strict=True)]

    def in_memory_order(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of the weights, each flat."""
        found, given = [], iter(gradients)
        for stack in self.stacks:
            some = islice(given, len(stack.layers))
            found += [(one if stack.in_order else one.permute(stack.order)).reshape(-1) for one in some]
        return found


def _steps(stack: Stack, a: int, c: int, inner: int, columns: int, weight: int) -> Iterator[tuple[str, Product]]:
    """The products of one layer, each with the name of its step.

    Args:
        stack: of the layer.
        a, c: where its factors of the rows and of the wide mode begin.
        inner, columns, weight: where the intermediate results and its weight do.
    """
    (rows, rank), (wide, wide_rank), (_, rest) = _factors(stack)
    small, scale = _small(stack), stack.scale
    step = 1 if stack.modes[-1] == stack.wide else small  # of the wide mode in a row of columns
    # A row of inner [r_1, r_wide, small] or of columns is a pair of a rank and a small position.
    pairs = rank * small
    of_inner = Walk(wide_rank * small, 1, small) if small > 1 else Walk(wide_rank)
    of_columns = Walk(rest, 1, small) if step > 1 else Walk(wide)
    where = "_small" if stack.small else ""
    yield (
        "columns" + where,
        Product(pairs, wide, wide_rank, inner, of_inner, Walk(small), c, Walk(1), wide_rank, columns, of_columns, step),
    )
    yield (
        "weights",
        Product(rows, rest, rank, a, Walk(rank), Walk(1), columns, Walk(rest), 1, weight, Walk(rest), 1, scale),
    )
    yield (
        "to_left",
        Product(rows, rank, rest, weight, Walk(rest), Walk(1), columns, Walk(1), rest, a, Walk(rank), 1, scale),
    )
    yield (
        "to_columns",
        Product(rank, rest, rows, a, Walk(1), Walk(rank), weight, Walk(rest), 1, columns, Walk(rest), 1, scale),
    )
    yield (
        "to_inner" + where,
        Product(pairs, wide_rank, wide, columns, of_columns, Walk(step), c, Walk(wide_rank), 1, inner, of_inner, small),
    )
    yield (
        "to_wide" + where,
        Product(wide, wide_rank, pairs, columns, Walk(step), of_columns, inner, of_inner, small, c, Walk(wide_rank), 1),
    )


def _factors(stack: Stack) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Shapes of the factors of the rows and of the wide mode, and of columns, of one layer."""
    (rows, wide), (rank, wide_rank) = stack.sizes(stack.outer), (stack.ranks[mode] for mode in stack.outer)
    return (rows, rank), (wide, wide_rank), (rank, wide * _small(stack))


def _small(stack: Stack) -> int:
    return math.prod(stack.sizes(stack.small))


def _odd(stack: Stack) -> bool:
    (rows, _), _, (rank, rest) = _factors(stack)
    return bool(rank * rest % 8 or rows * rest % 8)


def _tile(step: str, products: Sequence[Product]) -> tuple[int, int, int]:
    sizes = (max(one.m for one in products), max(one.n for one in products), max(one.k for one in products))
    most = _TILES[step.removesuffix("_small")]
    rows, columns, depth = (
        min(limit, max(16, 1 << (size - 1).bit_length())) for limit, size in zip(most, sizes, strict=True)
    )
    return rows, columns, depth


class _Build(torch.autograd.Function):
    """The weights of all layers of a plan from their cores and factors."""

    @staticmethod
    def forward(ctx: Any, plan: Grouped, *parameters: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(parameters[0].device.type, enabled=False):
            flat = torch._C._nn.flatten_dense_tensors(list(parameters))
            room = flat.new_empty(plan.room)
            products = plan.small_products(plan.split(flat))
            for (core, kronecker), inner in zip(products, plan.split_inner(room, products), strict=True):
                if kronecker is not None:
                    torch.bmm(core, kronecker.mT, out=inner)
            plan.run("columns", flat, flat, room)
            plan.run("columns_small", room, flat, room)
            weights = flat.new_empty(plan.weights, dtype=plan.dtype)
            plan.run("weights", flat, room, weights, [layer.base_layer._parameters["weight"] for layer in plan.layers])
            ctx.plan, ctx.flat, ctx.room, ctx.products = plan, flat, room, products
            ctx.save_for_backward(*parameters)
            return tuple(weights.as_strided(*place) for place in plan.places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        plan: Grouped = ctx.plan
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted, which the fast path below does not record
            return None, *plan.differentiable_gradients(ctx.saved_tensors, gradients)
        with torch.autocast(gradients[0].device.type, enabled=False):
            flat, before, given = ctx.flat, ctx.room, torch.cat(plan.in_memory_order(gradients))
            found, room = torch.empty_like(flat), torch.empty_like(before)
            plan.run("to_left", given, before, found)
            plan.run("to_columns", flat, given, room)
            plan.run("to_inner", room, flat, found)
            plan.run("to_inner_small", room, flat, room)
            plan.run("to_wide", room, flat, found)
            plan.run("to_wide_small", room, before, found)
            blocks, places = plan.split(flat), plan.split(found)
            inners = plan.split_inner(room, ctx.products)
            for members, (core, kronecker), inner in zip(plan.families, ctx.products, inners, strict=True):
                if kronecker is None:
                    continue
                one = members[0]
                factors = plan.factors_back(members, blocks, inner.mT @ core)
                for mode, factor in zip(one.small, factors, strict=True):
                    places[plan.index[one, mode]].copy_(factor)
                places[plan.index[one, None]].copy_(plan.cores_back(one, inner @ kronecker))
            return None, *torch._C._nn.unflatten_dense_tensors(found, ctx.saved_tensors)
