"""Weights built all together: each step of the contraction is one launch, or few, over all layers of a model.

With G the core, A the factor of the rows and C that of the wide mode: inner is G times the factors of the small modes,
one mode after the other; columns = inner C^T; weight = base + scale A columns. Backward, D being a weight's gradient:
dA = scale D columns^T, dcolumns = scale A^T D, dinner = dcolumns C, dC = dcolumns^T inner, and so on to the core.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from flora.adapters.fast.plan import Plan, Stack
from flora.adapters.fast.triton_kernel import Operand, Product, Products, Walk, scattered

# Rows, columns and depth of a tile, at most; a step of smaller products has smaller ones.
_TILES = {
    "small": (64, 16, 16),
    "columns": (16, 128, 64),
    "weights": (64, 64, 64),
    "to_left": (64, 64, 64),
    "to_columns": (64, 64, 64),
    "to_inner": (32, 64, 64),
    "to_wide": (64, 64, 64),
    "to_factor": (16, 16, 64),
    "to_small": (64, 16, 16),
}


class Grouped(Plan):
    """A plan whose stacks are built together on a GPU: fp32 adapters, dense base weights with a wide mode.

    The kernel reads parameters, base weights and their gradients where they lie.

    Attributes:
        dtype: of the weights.
        layers: in the order of the weights.
        weights: size of each stack's weights.
        room: size of the buffer of intermediate results.
        depth: most small modes of a layer.
        operands: which parameters the products of a step read, one per product.
    """

    room: int
    operands: dict[str, list[int]]

    def __init__(self, stacks: Sequence[Stack]) -> None:
        super().__init__(sorted(stacks, key=_odd))  # what follows an odd size is not aligned
        self.dtype = stacks[0].dtype
        self.layers = [layer for stack in self.stacks for layer in stack.layers]
        self.weights = [len(stack.layers) * math.prod(stack.described.shape) for stack in self.stacks]
        self.depth = max(len(stack.small) for stack in self.stacks)
        found: dict[str, list[Product]] = {}
        for name, product in self._products():
            found.setdefault(name, []).append(product)
        device = self.layers[0].base_layer._parameters["weight"].device
        self._steps = {name: Products(products, _tile(name, products), device) for name, products in found.items()}

    def _products(self) -> Iterator[tuple[str, Product]]:
        """The products of all steps, layer by layer; notes which parameters they read, and their room."""
        self.room, self.operands = 0, {}
        firsts = list(accumulate((view[0] for view in self.views), initial=0))
        starts = list(accumulate(self.sizes, initial=0))
        weight = 0
        for members in self.families:
            before = 0
            for stack in members:
                for i in range(len(stack.layers)):
                    places = {}
                    for mode in (None, *stack.modes):
                        # Cores and small factors are in one block for the family, the others in one for the stack.
                        shared = mode is None or mode in stack.small
                        block = self.index[members[0] if shared else stack, mode]
                        number = before + i if shared else i
                        places[mode] = starts[block] + number * math.prod(self.views[block][1:])
                        self.operands.setdefault(_operand(stack, mode), []).append(firsts[block] + number)
                    yield from _steps(stack, places, self.room, weight)
                    self.room += sum(_rooms(stack))
                    weight += math.prod(stack.described.shape)
                before += len(stack.layers)

    @override
    def merge(self, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return _Build.apply(self, *parameters)

    def run(
        self, step: str, a: Tensor | Operand | None, b: Tensor | Operand | None, c: Tensor, base: Operand | None = None
    ) -> None:
        """Compute a step of the contraction for all layers that have it; None stands for an operand without layers."""
        if a is not None and b is not None and step in self._steps:
            self._steps[step](a, b, c, base)

    def where_they_lie(self, parameters: Sequence[Tensor]) -> dict[str, Operand | None]:
        """The operands that parameters are."""
        found: dict[str, Operand | None] = dict.fromkeys(("core", "small_core", "wide", "small_wide"))
        for name, numbers in self.operands.items():
            tensors = [parameters[i] for i in numbers]
            found[name] = scattered([one if one.is_contiguous() else one.contiguous() for one in tensors])
        return found

    def in_memory_order(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of the weights, each dense and laid out as its weight."""
        found, given = [], iter(gradients)
        for stack in self.stacks:
            for one in islice(given, len(stack.layers)):
                seen = one if stack.in_order else one.permute(stack.order)
                found.append(seen if seen.is_contiguous() else seen.contiguous())
        return found


def takes(stack: Stack) -> bool:
    """Whether the products below can build the stack: dense weights with a wide mode, after the rows in the core."""
    within = math.prod(stack.described.shape) <= 2**31  # the kernel counts a product's elements in 32 bits
    return within and stack.dense and stack.wide is not None and stack.modes[0] < stack.wide


def _operand(stack: Stack, mode: int | None) -> str:
    """Which operand a core (mode None) or factor belongs to; with small modes, other steps read it."""
    if mode in stack.small:
        return f"small_{_in_turn(stack).index(mode)}"  # type: ignore[arg-type]
    if mode == stack.modes[0]:
        return "rows"
    return ("small_" if stack.small else "") + ("core" if mode is None else "wide")


def _in_turn(stack: Stack) -> tuple[int, ...]:
    """The small modes in the order in which their factors are multiplied into the core."""
    return stack.small[::-1]


def _contractions(stack: Stack) -> Iterator[tuple[int, int, int, int, int]]:
    """Each small mode's turn: the sizes before and after it in the core as it is then, of those done, its rank, size.

    A turn takes [before, rank, after, done] to [before, after, size, done].
    """
    left, done = sorted(stack.modes), 1
    for mode in _in_turn(stack):
        place = left.index(mode)
        before, after = (math.prod(stack.ranks[m] for m in some) for some in (left[:place], left[place + 1 :]))
        yield before, after, done, stack.ranks[mode], stack.described.shape[mode]
        left.remove(mode)
        done *= stack.described.shape[mode]


def _rooms(stack: Stack) -> list[int]:
    """Room for a layer's intermediate results: the core after each small mode, and its columns."""
    (_, rank), _, (_, rest) = _factors(stack)
    sizes = [before * after * size * done for before, after, done, _, size in _contractions(stack)] + [rank * rest]
    return [-(-size // 8) * 8 for size in sizes]  # so that what follows is aligned


def _steps(stack: Stack, places: dict[int | None, int], room: int, weight: int) -> Iterator[tuple[str, Product]]:
    """The products of one layer, each with the name of its step.

    Args:
        stack: of the layer.
        places: where the gradients of its core (None) and factors begin.
        room, weight: where its intermediate results and its weight do.
    """
    (rows, rank), (wide, wide_rank), (_, rest) = _factors(stack)
    small, scale, one = math.prod(stack.sizes(stack.small)), stack.scale, Walk(1)
    *inners, columns = accumulate([room, *_rooms(stack)[:-1]])
    # A core is a tensor of its own, so begins at 0; its gradient begins where places say.
    before, after = [0, *inners], [places[None], *inners]
    for turn, (outer, inner, done, r, d) in enumerate(_contractions(stack)):
        through = inner * done
        of_core = Walk(r * through, 1, through) if through > 1 else Walk(r)
        of_next = Walk(d * done, 1, done) if done > 1 else Walk(d)
        m, factor = outer * through, places[_in_turn(stack)[turn]]
        yield (
            f"small_{turn}",
            Product(m, d, r, before[turn], of_core, Walk(through), 0, one, r, inners[turn], of_next, done),
        )
        yield (
            f"to_factor_{turn}",
            Product(d, r, m, inners[turn], Walk(done), of_next, before[turn], of_core, through, factor, Walk(r), 1),
        )
        yield (
            f"to_small_{turn}",
            Product(m, r, d, inners[turn], of_next, Walk(done), 0, Walk(r), 1, after[turn], of_core, through),
        )
    step = 1 if stack.modes[-1] == stack.wide else small  # of the wide mode in a row of columns
    # A row of inner [r_1, r_wide, small] or of columns is a pair of a rank and a small position.
    pairs = rank * small
    of_inner = Walk(wide_rank * small, 1, small) if small > 1 else Walk(wide_rank)
    of_columns = Walk(rest, 1, small) if step > 1 else Walk(wide)
    where = "small_" if stack.small else ""
    yield (
        where + "columns",
        Product(
            pairs, wide, wide_rank, before[-1], of_inner, Walk(small), 0, one, wide_rank, columns, of_columns, step
        ),
    )
    yield (
        "weights",
        Product(rows, rest, rank, 0, Walk(rank), one, columns, Walk(rest), 1, weight, Walk(rest), 1, scale),
    )
    left, right = places[stack.modes[0]], places[stack.wide]
    yield "to_left", Product(rows, rank, rest, 0, Walk(rest), one, columns, one, rest, left, Walk(rank), 1, scale)
    yield "to_columns", Product(rank, rest, rows, 0, one, Walk(rank), 0, Walk(rest), 1, columns, Walk(rest), 1, scale)
    yield (
        where + "to_inner",
        Product(
            pairs, wide_rank, wide, columns, of_columns, Walk(step), 0, Walk(wide_rank), 1, after[-1], of_inner, small
        ),
    )
    yield (
        where + "to_wide",
        Product(
            wide, wide_rank, pairs, columns, Walk(step), of_columns, before[-1], of_inner, small, right,
            Walk(wide_rank), 1,
        ),
    )  # fmt: skip


def _factors(stack: Stack) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Shapes of the factors of the rows and of the wide mode, and of columns, of one layer."""
    (rows, wide), (rank, wide_rank) = stack.sizes(stack.outer), (stack.ranks[mode] for mode in stack.outer)
    return (rows, rank), (wide, wide_rank), (rank, math.prod(stack.sizes(stack.modes[1:])))


def _odd(stack: Stack) -> bool:
    (rows, _), _, (rank, rest) = _factors(stack)
    return bool(rank * rest % 8 or rows * rest % 8)


def _tile(step: str, products: Sequence[Product]) -> tuple[int, int, int]:
    sizes = (max(one.m for one in products), max(one.n for one in products), max(one.k for one in products))
    most = _TILES[step.removeprefix("small_").rstrip("_0123456789") or "small"]
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
            room, held = one.new_empty(plan.room), plan.where_they_lie(parameters)
            for turn in range(plan.depth):
                plan.run(f"small_{turn}", room if turn else held["small_core"], held[f"small_{turn}"], room)
            plan.run("columns", held["core"], held["wide"], room)
            plan.run("small_columns", room, held["small_wide"], room)
            weights = one.new_empty(sum(plan.weights), dtype=plan.dtype)
            bases: Any = [layer._modules["base_layer"] for layer in plan.layers]  # past nn.Module's attribute lookup
            base = scattered([layer._parameters["weight"] for layer in bases])
            plan.run("weights", held["rows"], room, weights, base)
            ctx.plan, ctx.room = plan, room
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
            before, held = ctx.room, plan.where_they_lie(parameters)
            given = scattered(plan.in_memory_order(gradients))
            found, room = before.new_empty(sum(plan.sizes)), torch.empty_like(before)
            plan.run("to_left", given, before, found)
            plan.run("to_columns", held["rows"], given, room)
            plan.run("to_inner", room, held["wide"], found)
            plan.run("to_wide", room, held["core"], found)
            plan.run("small_to_inner", room, held["small_wide"], room)
            plan.run("small_to_wide", room, before, found)
            for turn in reversed(range(plan.depth)):
                plan.run(f"to_factor_{turn}", room, before if turn else held["small_core"], found)
                plan.run(f"to_small_{turn}", room, held[f"small_{turn}"], room if turn else found)
            return None, *[gradient for part in plan.split(found) for gradient in part.unbind(0)]
