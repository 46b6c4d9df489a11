"""Weights built all together: each step of the contraction is one launch, or few, over all layers of a model.

With G the core, A the factor of the rows and C that of the wide mode: inner is G times the factors of the small modes,
mode by mode; columns = inner C^T; weight = base + scale A columns. Backward, D being a weight's gradient:
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


class TritonPlan(Plan):
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
        steps: dict[str, list[Product]] = {}
        for name, product in self._products():
            steps.setdefault(name, []).append(product)
        device = self.layers[0].base_layer._parameters["weight"].device
        self._steps = {name: Products(products, _tile(name, products), device) for name, products in steps.items()}

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
        operands: dict[str, Operand | None] = dict.fromkeys(("core", "small_core", "wide", "small_wide"))
        for name, numbers in self.operands.items():
            tensors = [parameters[i] for i in numbers]
            operands[name] = scattered([t if t.is_contiguous() else t.contiguous() for t in tensors])
        return operands

    def in_memory_order(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of the weights, each dense and laid out as its weight."""
        dense, given = [], iter(gradients)
        for stack in self.stacks:
            for gradient in islice(given, len(stack.layers)):
                ordered = gradient if stack.in_order else gradient.permute(stack.order)
                dense.append(ordered if ordered.is_contiguous() else ordered.contiguous())
        return dense


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
    small, scale, unit = math.prod(stack.sizes(stack.small)), stack.scale, Walk(1)
    *inners, columns = accumulate([room, *_rooms(stack)[:-1]])
    # A core is a tensor of its own, so begins at 0; its gradient begins where places say.
    before, after = [0, *inners], [places[None], *inners]
    for turn, (outer, inner, done, r, d) in enumerate(_contractions(stack)):
        through = inner * done
        of_core = Walk(r * through, 1, through) if through > 1 else Walk(r)
        of_next = Walk(d * done, 1, done) if done > 1 else Walk(d)
        m, factor = outer * through, places[_in_turn(stack)[turn]]
        # core [o, r, i, s], factor [d, r] -> core of the next turn: "oris,dr->oids"
        yield (
            f"small_{turn}",
            Product(
                m=m, n=d, k=r,
                a=before[turn], a_m=of_core, a_k=Walk(through),
                b=0, b_k=unit, b_n=r,
                c=inners[turn], c_m=of_next, c_n=done,
            ),
        )  # fmt: skip
        # gradient of the next core, core -> gradient of the factor: "oids,oris->dr"
        yield (
            f"to_factor_{turn}",
            Product(
                m=d, n=r, k=m,
                a=inners[turn], a_m=Walk(done), a_k=of_next,
                b=before[turn], b_k=of_core, b_n=through,
                c=factor, c_m=Walk(r), c_n=1,
            ),
        )  # fmt: skip
        # gradient of the next core, factor -> gradient of the core: "oids,dr->oris"
        yield (
            f"to_small_{turn}",
            Product(
                m=m, n=r, k=d,
                a=inners[turn], a_m=of_next, a_k=Walk(done),
                b=0, b_k=Walk(r), b_n=1,
                c=after[turn], c_m=of_core, c_n=through,
            ),
        )  # fmt: skip
    step = 1 if stack.modes[-1] == stack.wide else small  # of the wide mode in a row of columns
    # A row of inner [r_1, r_wide, small] or of columns is a pair of a rank and a small position.
    pairs = rank * small
    of_inner = Walk(wide_rank * small, 1, small) if small > 1 else Walk(wide_rank)
    of_columns = Walk(rest, 1, small) if step > 1 else Walk(wide)
    where = "small_" if stack.small else ""
    # Below, r is a rank of the rows, w one of the wide mode, s a small position, y a row, x a place in the wide mode;
    # columns, weights and their gradients lie as [.., x, s] or [.., s, x], whichever is the weight's memory order.
    # inner, factor of the wide mode -> columns: "rws,xw->rxs"
    yield (
        where + "columns",
        Product(
            m=pairs, n=wide, k=wide_rank,
            a=before[-1], a_m=of_inner, a_k=Walk(small),
            b=0, b_k=unit, b_n=wide_rank,
            c=columns, c_m=of_columns, c_n=step,
        ),
    )  # fmt: skip
    # factor of the rows, columns -> weight, scaled and added to the base: "yr,rxs->yxs"
    yield (
        "weights",
        Product(
            m=rows, n=rest, k=rank,
            a=0, a_m=Walk(rank), a_k=unit,
            b=columns, b_k=Walk(rest), b_n=1,
            c=weight, c_m=Walk(rest), c_n=1,
            scale=scale,
        ),
    )  # fmt: skip
    left, right = places[stack.modes[0]], places[stack.wide]
    # gradient of the weight, columns -> that of the factor of the rows, scaled: "yxs,rxs->yr"
    yield (
        "to_left",
        Product(
            m=rows, n=rank, k=rest,
            a=0, a_m=Walk(rest), a_k=unit,
            b=columns, b_k=unit, b_n=rest,
            c=left, c_m=Walk(rank), c_n=1,
            scale=scale,
        ),
    )  # fmt: skip
    # factor of the rows, gradient of the weight -> that of the columns, scaled: "yr,yxs->rxs"
    yield (
        "to_columns",
        Product(
            m=rank, n=rest, k=rows,
            a=0, a_m=unit, a_k=Walk(rank),
            b=0, b_k=Walk(rest), b_n=1,
            c=columns, c_m=Walk(rest), c_n=1,
            scale=scale,
        ),
    )  # fmt: skip
    # gradient of the columns, factor of the wide mode -> that of inner: "rxs,xw->rws"
    yield (
        where + "to_inner",
        Product(
            m=pairs, n=wide_rank, k=wide,
            a=columns, a_m=of_columns, a_k=Walk(step),
            b=0, b_k=Walk(wide_rank), b_n=1,
            c=after[-1], c_m=of_inner, c_n=small,
        ),
    )  # fmt: skip
    # gradient of the columns, inner -> that of the factor of the wide mode: "rxs,rws->xw"
    yield (
        where + "to_wide",
        Product(
            m=wide, n=wide_rank, k=pairs,
            a=columns, a_m=Walk(step), a_k=of_columns,
            b=before[-1], b_k=of_inner, b_n=small,
            c=right, c_m=Walk(wide_rank), c_n=1,
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
    sizes = (max(p.m for p in products), max(p.n for p in products), max(p.k for p in products))
    most = _TILES[step.removeprefix("small_").rstrip("_0123456789") or "small"]
    rows, columns, depth = (
        min(limit, max(16, 1 << (size - 1).bit_length())) for limit, size in zip(most, sizes, strict=True)
    )
    return rows, columns, depth


class _Build(torch.autograd.Function):
    """The weights of all layers of a plan from their cores and factors."""

    @staticmethod
    def forward(ctx: Any, plan: TritonPlan, *parameters: Tensor) -> tuple[Tensor, ...]:
        like = parameters[0]
        with torch.cuda.device_of(like), torch.autocast(like.device.type, enabled=False):
            room, operands = like.new_empty(plan.room), plan.where_they_lie(parameters)
            for turn in range(plan.depth):
                plan.run(f"small_{turn}", room if turn else operands["small_core"], operands[f"small_{turn}"], room)
            plan.run("columns", operands["core"], operands["wide"], room)
            plan.run("small_columns", room, operands["small_wide"], room)
            weights = like.new_empty(sum(plan.weights), dtype=plan.dtype)
            bases: Any = [layer._modules["base_layer"] for layer in plan.layers]  # past nn.Module's attribute lookup
            base = scattered([layer._parameters["weight"] for layer in bases])
            plan.run("weights", operands["rows"], room, weights, base)
            ctx.plan, ctx.room = plan, room
            ctx.save_for_backward(*parameters)
            ctx.set_materialize_grads(False)
            parts = zip(plan.stacks, weights.split_with_sizes(plan.weights), strict=True)
            return tuple([weight for stack, part in parts for weight in stack.unstack(part)])

    @staticmethod
    def backward(ctx: Any, *received: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: TritonPlan = ctx.plan
        if all(gradient is None for gradient in received):
            return (None,) * len(ctx.needs_input_grad)
        parameters, gradients = ctx.saved_tensors, plan.given(received)
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted, which the fast path below does not record
            return None, *plan.wanted(plan.differentiable_gradients(parameters, gradients), received)
        with torch.autocast(gradients[0].device.type, enabled=False):
            before, operands = ctx.room, plan.where_they_lie(parameters)
            given = scattered(plan.in_memory_order(gradients))
            flat, room = before.new_empty(sum(plan.sizes)), torch.empty_like(before)
            plan.run("to_left", given, before, flat)
            plan.run("to_columns", operands["rows"], given, room)
            plan.run("to_inner", room, operands["wide"], flat)
            plan.run("to_wide", room, operands["core"], flat)
            plan.run("small_to_inner", room, operands["small_wide"], room)
            plan.run("small_to_wide", room, before, flat)
            for turn in reversed(range(plan.depth)):
                plan.run(f"to_factor_{turn}", room, before if turn else operands["small_core"], flat)
                plan.run(f"to_small_{turn}", room, operands[f"small_{turn}"], room if turn else flat)
            return None, *plan.wanted([g for part in plan.split(flat) for g in part.unbind(0)], received)
