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

from flora.adapters.kernels import Operand, Product, Products, Walk, scattered
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
    """A plan whose stacks are built together on a GPU: fp32 adapters, dense base weights with a wide mode.

    The kernel reads parameters, base weights and their gradients where they lie. Only cores and factors of small modes
    are copied together first.
    """

    def __init__(self, stacks: Sequence[Stack]) -> None:
        super().__init__(sorted(stacks, key=_odd))  # what follows an odd size is not aligned
        self.dtype = stacks[0].dtype
        self.layers = [layer for stack in self.stacks for layer in stack.layers]
        self.weights = [len(stack.layers) * math.prod(stack.described.shape) for stack in self.stacks]
        self.folded = [members for members in self.families if members[0].small]
        self._inner = [self._inner_size(members) for members in self.folded]
        self.inner = sum(self._inner)
        self.room = self.inner + sum(self.columns)
        self._number()
        found: dict[str, list[Product]] = {}
        for name, product in self._products():
            found.setdefault(name, []).append(product)
        device = self.layers[0].base_layer._parameters["weight"].device
        self._steps = {name: Products(products, _tile(name, products), device) for name, products in found.items()}

    def _number(self) -> None:
        """Note where in the list of parameters each operand of the steps is found, and what is copied together."""
        first = list(accumulate((view[0] for view in self.views), initial=0))
        self.operands: dict[str, list[int]] = {"rows": [], "wide": [], "wide_small": [], "cores": []}
        self.packed: dict[int, range] = {}
        for members in self.families:
            one, where, before = members[0], "_small" if members[0].small else "", 0
            for mode in (None, *one.small) if one.small else ():
                block = self.index[one, mode]
                self.packed[block] = range(first[block], first[block + 1])
            for stack in members:
                n = len(stack.layers)
                for name, mode in zip(("rows", "wide" + where), stack.outer, strict=True):
                    start = first[self.index[stack, mode]]
                    self.operands[name] += range(start, start + n)
                if not one.small:
                    start = first[self.index[one, None]] + before
                    self.operands["cores"] += range(start, start + n)
                before += n

    def _inner_size(self, members: tuple[Stack, ...]) -> int:
        """Size of a family's cores with small factors multiplied in."""
        ranks = math.prod(members[0].ranks[mode] for mode in members[0].outer)
        return sum(len(stack.layers) for stack in members) * ranks * _small(members[0])

    def _products(self) -> Iterator[tuple[str, Product]]:
        """The products of all steps, layer by layer."""
        blocks = list(accumulate(self.sizes, initial=0))
        inners, columns = accumulate(self._inner, initial=0), accumulate(self.columns, initial=self.inner)
        sizes = (math.prod(stack.described.shape) for stack in self.stacks for _ in stack.layers)
        weights = accumulate(sizes, initial=0)
        for members in self.families:
            one = members[0]
            inner = next(inners) if one.small else blocks[self.index[one, None]]
            size = math.prod(one.ranks[mode] for mode in one.outer) * _small(one)
            for stack, column in zip(members, columns, strict=False):
                rows, wide = (blocks[self.index[stack, mode]] for mode in stack.outer)
                for i, weight in zip(range(len(stack.layers)), weights, strict=False):
                    left, right, row = (math.prod(shape) for shape in _factors(stack))
                    yield from _steps(stack, rows + i * left, wide + i * right, inner, column + i * row, weight)
                    inner += size

    @override
    def build(self, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return _Build.apply(self, *parameters)

    def run(
        self, step: str, a: Tensor | Operand | None, b: Tensor | Operand | None, c: Tensor, base: Operand | None = None
    ) -> None:
        """Compute a step of the contraction for all layers that have it; None stands for an operand without layers."""
        if a is not None and b is not None and step in self._steps:
            self._steps[step](a, b, c, base)

    def where_they_lie(self, parameters: Sequence[Tensor]) -> dict[str, Operand | None]:
        """The operands that parameters are."""
        found: dict[str, Operand | None] = {}
        for name, numbers in self.operands.items():
            tensors = [parameters[i] for i in numbers]
            tensors = [one if one.is_contiguous() else one.contiguous() for one in tensors]
            found[name] = scattered(tensors) if tensors else None
        return found

    def pack(self, parameters: Sequence[Tensor]) -> dict[int, Tensor]:
        """Cores and factors of small modes, block by block."""
        chosen = [parameters[i] for block in self.packed.values() for i in block]
        if not chosen:
            return {}
        flat = torch._C._nn.flatten_dense_tensors(chosen)
        parts = flat.split_with_sizes([self.sizes[block] for block in self.packed])
        return {block: part.view(self.views[block]) for block, part in zip(self.packed, parts, strict=True)}

    def split_inner(self, room: Tensor, products: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        """Per family with small modes [n, r_1 * r_wide, small], views of ``room``."""
        parts = room[: self.inner].split_with_sizes(self._inner)
        return [part.view(*core.shape[:2], -1) for part, (core, _) in zip(parts, products, strict=True)]

    def in_memory_order(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of the weights, each dense and laid out as its weight."""
        found, given = [], iter(gradients)
        for stack in self.stacks:
            for one in islice(given, len(stack.layers)):
                seen = one if stack.in_order else one.permute(stack.order)
                found.append(seen if seen.is_contiguous() else seen.contiguous())
        return found


def _steps(stack: Stack, a: int, c: int, inner: int, columns: int, weight: int) -> Iterator[tuple[str, Product]]:
    """The products of one layer, each with the name of its step.

    Args:
        stack: of the layer.
        a, c: where the gradients of its factors of the rows and of the wide mode begin.
        inner, columns, weight: where the intermediate results (without small modes, the core's gradient) and its weight
            do.
    """
    (rows, rank), (wide, wide_rank), (_, rest) = _factors(stack)
    small, scale = _small(stack), stack.scale
    step = 1 if stack.modes[-1] == stack.wide else small  # of the wide mode in a row of columns
    # A row of inner [r_1, r_wide, small] or of columns is a pair of a rank and a small position.
    pairs = rank * small
    of_inner = Walk(wide_rank * small, 1, small) if small > 1 else Walk(wide_rank)
    of_columns = Walk(rest, 1, small) if step > 1 else Walk(wide)
    where = "_small" if stack.small else ""
    core = inner if stack.small else 0  # a core is a tensor of its own, as factors, weights and their gradients are
    one = Walk(1)
    yield (
        "columns" + where,
        Product(pairs, wide, wide_rank, core, of_inner, Walk(small), 0, one, wide_rank, columns, of_columns, step),
    )
    yield (
        "weights",
        Product(rows, rest, rank, 0, Walk(rank), one, columns, Walk(rest), 1, weight, Walk(rest), 1, scale),
    )
    yield "to_left", Product(rows, rank, rest, 0, Walk(rest), one, columns, one, rest, a, Walk(rank), 1, scale)
    yield "to_columns", Product(rank, rest, rows, 0, one, Walk(rank), 0, Walk(rest), 1, columns, Walk(rest), 1, scale)
    yield (
        "to_inner" + where,
        Product(pairs, wide_rank, wide, columns, of_columns, Walk(step), 0, Walk(wide_rank), 1, inner, of_inner, small),
    )
    yield (
        "to_wide" + where,
        Product(wide, wide_rank, pairs, columns, Walk(step), of_columns, core, of_inner, small, c, Walk(wide_rank), 1),
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
        one = parameters[0]
        with torch.cuda.device_of(one), torch.autocast(one.device.type, enabled=False):
            room, blocks = one.new_empty(plan.room), plan.pack(parameters)
            products = plan.small_products(blocks, plan.folded)
            for (core, kronecker), inner in zip(products, plan.split_inner(room, products), strict=True):
                torch.bmm(core, kronecker.mT, out=inner)  # type: ignore[union-attr]
            held = plan.where_they_lie(parameters)
            plan.run("columns", held["cores"], held["wide"], room)
            plan.run("columns_small", room, held["wide_small"], room)
            weights = one.new_empty(sum(plan.weights), dtype=plan.dtype)
            base = scattered([layer.base_layer._parameters["weight"] for layer in plan.layers])
            plan.run("weights", held["rows"], room, weights, base)
            ctx.plan, ctx.room, ctx.blocks, ctx.products = plan, room, blocks, products
            ctx.save_for_backward(*parameters)
            parts = zip(plan.stacks, weights.split_with_sizes(plan.weights), strict=True)
            return tuple([weight for stack, part in parts for weight in stack.unstack(part)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        plan: Grouped = ctx.plan
        parameters = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted, which the fast path below does not record
            return None, *plan.differentiable_gradients(parameters, gradients)
        with torch.autocast(gradients[0].device.type, enabled=False):
            before, dense = ctx.room, plan.in_memory_order(gradients)
            held, given = plan.where_they_lie(parameters), scattered(dense)
            found, room = before.new_empty(sum(plan.sizes)), torch.empty_like(before)
            plan.run("to_left", given, before, found)
            plan.run("to_columns", held["rows"], given, room)
            plan.run("to_inner", room, held["wide"], found)
            plan.run("to_inner_small", room, held["wide_small"], room)
            plan.run("to_wide", room, held["cores"], found)
            plan.run("to_wide_small", room, before, found)
            inners, places = plan.split_inner(room, ctx.products), plan.split(found)
            for members, (core, kronecker), inner in zip(plan.folded, ctx.products, inners, strict=True):
                one = members[0]
                factors = plan.factors_back(members, ctx.blocks, inner.mT @ core)
                for mode, factor in zip(one.small, factors, strict=True):
                    places[plan.index[one, mode]].copy_(factor)
                places[plan.index[one, None]].copy_(plan.cores_back(one, inner @ kronecker))
            return None, *[gradient for place in places for gradient in place.unbind(0)]
