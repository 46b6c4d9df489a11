"""Weights built together within a compiled region: plain operations that torch.compile traces and fuses.

A region that enters ``flora.batched`` builds the weights at that point, in batched matrix products over layers of one
shape. torch.compile's front end sees one function of the cores, factors and base weights; its back end sees what that
function computes, forward and backward.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flora.adapters.fast.factored_plan import FactoredStack, factored_stacks
from flora.adapters.fast.plan import Stack, stacks
from flora.adapters.fast.torch_plan import gather
from flora.adapters.layer import FloraLayer
from flora.replaced.weights import AdaptedWeight

# Of a stack of merged layers: how many, shape and ranks by mode, modes in memory order, stored shape, scale, dtype.
# Of a stack of factored ones: how many, whether the rows take the core, scale, dtype.
Merged = tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], float, torch.dtype]
Factored = tuple[int, bool, float, torch.dtype]


class TracedPass:
    """What a compiled region built when it entered ``flora.batched``.

    A layer that has changed since (other adapters, scale or parameters) builds its own, as does one that runs in
    another mode of autograd or autocast than that of the entry. Nothing is built later than at the entry: what is built
    within a part that is checkpointed, or transformed by functorch, could not be used outside it.
    """

    def __init__(self, layers: Sequence[FloraLayer], outer: "TracedPass | None") -> None:
        self._outer = outer
        self._ready: dict[int, tuple[Any, Any, list[Tensor]]] = {}
        self._devices: list[str] = []
        for layer in layers:
            weight = layer.base_layer._parameters.get("weight")
            if weight is not None and weight.device.type not in self._devices:
                self._devices.append(weight.device.type)
        self._mode = self._mode_now()
        places: dict[Any, tuple[list[Stack], list[FactoredStack]]] = {}
        for merged in stacks(layers):
            core, weight = merged.layers[0].core(merged.adapter), merged.layers[0].base_weight("weight")
            if core.device == weight.device:
                places.setdefault((core.device, core.dtype), ([], []))[0].append(merged)
        for factored in factored_stacks(layers):
            core = factored.layers[0].core(factored.adapter)
            places.setdefault((core.device, core.dtype), ([], []))[1].append(factored)
        for merged_ones, factored_ones in places.values():
            self._build(merged_ones, factored_ones)

    def _build(self, merged: list[Stack], factored: list[FactoredStack]) -> None:
        members = [(layer, stack.adapter) for stack in merged for layer in stack.layers]
        members += [(layer, stack.adapter) for stack in factored for layer in stack.layers]
        sources = [_parameters(layer, adapter) for layer, adapter in members]
        parameters = [parameter for own in sources for parameter in own]
        if len({parameter.dtype for parameter in parameters}) > 1:
            return
        merged_ones = tuple(
            (len(s.layers), s.described.shape, s.ranks, s.modes, s.described.weight_shape, s.scale, s.dtype)
            for s in merged
        )
        factored_ones = tuple((len(s.layers), s.core_side == "rows", s.scale, s.dtype) for s in factored)
        bases = [layer.base_weight("weight") for stack in merged for layer in stack.layers]
        built = build(merged_ones, factored_ones, parameters, bases)
        for i, (layer, _) in enumerate(members):
            prepared = {"weight": built[i]} if i < len(bases) else (built[i], built[i + len(members) - len(bases)])
            self._ready[id(layer)] = prepared, _state(layer), [*sources[i], layer.base_weight("weight")]

    def prepared_for(self, layer: FloraLayer) -> Any:
        """What the layer runs with, if it was built and the layer stands as it did."""
        if id(layer) not in self._ready:
            return None if self._outer is None else self._outer.prepared_for(layer)
        if self._mode_now() != self._mode:
            return None
        prepared, state, sources = self._ready[id(layer)]
        if _state(layer) != state:
            return None
        now = [*_parameters(layer, layer.active_adapters[0]), layer.base_weight("weight")]
        for source, tensor in zip(sources, now, strict=True):  # functional_call gives others
            if source is not tensor:
                return None
        return prepared

    def _mode_now(self) -> tuple[Any, ...]:
        casts = [torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in self._devices]
        return torch.is_grad_enabled(), *casts

    def converted(self, input: Tensor, dtype: torch.dtype) -> Tensor:
        """A layer's input; the compiler finds by itself what is converted twice."""
        return input

    def linear_plus_thin(
        self, base: nn.Linear, input: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """A linear layer and the update ``left @ right`` of its weight; the compiler chooses the ops."""
        thin = F.linear(F.linear(input, right.to(input.dtype)), left.to(input.dtype))
        output = F.linear(input, base.weight, base.bias)
        return output + thin.to(output.dtype)


def _parameters(layer: FloraLayer, adapter: str) -> list[Tensor]:
    """The core, then the factors by mode."""
    factors = [factor for factor in layer.factors(adapter) if factor is not None]
    return [layer.core(adapter), *factors]


def _state(layer: FloraLayer) -> tuple[Any, ...]:
    """Which adapter a layer runs with, and how."""
    adapters = tuple(layer.active_adapters)
    off = layer.disable_adapters, len(layer.merged_adapters), layer.training
    return adapters, off, tuple(layer.scaling.items())


@torch.compiler.allow_in_graph
def build(
    merged: tuple[Merged, ...], factored: tuple[Factored, ...], parameters: list[Tensor], bases: list[Tensor]
) -> tuple[Tensor, ...]:
    """Weights of all merged layers, then the left and then the right thin matrices of all factored ones.

    Args:
        merged, factored: how the layers are grouped.
        parameters: layer by layer its core and its factors by mode, on one device, of one dtype.
        bases: the frozen weights of the merged layers.
    """
    return _Build.apply(merged, factored, len(bases), *bases, *parameters)


class _Build(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, merged: tuple[Merged, ...], factored: tuple[Factored, ...], count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        bases, parameters = list(tensors[:count]), list(tensors[count:])
        with torch.autocast(parameters[0].device.type, enabled=False):
            parts = _parts(merged, factored, parameters)
            place, built = 0, []
            for part in parts[: len(merged)]:
                built += part.outputs(bases[place : place + part.count])
                place += part.count
            pairs = [part.outputs() for part in parts[len(merged) :]]
            built += [matrix for side in (0, 1) for pair in pairs for matrix in pair[side]]
        ctx.merged, ctx.factored, ctx.count, ctx.parts = merged, factored, count, parts
        ctx.save_for_backward(*parameters)
        ctx.set_materialize_grads(False)
        return tuple(built)

    @staticmethod
    def backward(ctx: Any, *received: Tensor | None) -> tuple[Tensor | None, ...]:
        parameters, found, place = ctx.saved_tensors, [], 0
        right = (len(received) - ctx.count) // 2  # from a left thin matrix to its right one
        with torch.autocast(parameters[0].device.type, enabled=False):
            # What the forward pass computed has no graph, which a gradient of this gradient would need.
            again = torch.is_grad_enabled()
            parts = _parts(ctx.merged, ctx.factored, parameters) if again else ctx.parts
            for part in parts:
                given = received[place : place + part.count]
                if place < ctx.count:
                    found += part.gradients(given)
                else:
                    found += part.gradients(given, received[place + right : place + right + part.count])
                place += part.count
        return None, None, None, *[None] * ctx.count, *found


def _parts(merged: Sequence[Merged], factored: Sequence[Factored], parameters: Sequence[Tensor]) -> list[Any]:
    """The stacks with their parameters, which lie in one flat buffer, filled in one operation."""
    kinds: list[tuple[Any, int]] = [(stack, 1 + len(stack[3])) for stack in merged]
    kinds += [(stack, 3) for stack in factored]
    together: dict[tuple[int, int], Sequence[Tensor]] = {}
    place = 0
    for i, (stack, each) in enumerate(kinds):
        own = parameters[place : place + stack[0] * each]
        together |= {(i, kind): own[kind::each] for kind in range(each)}
        place += len(own)
    order = sorted(together, key=lambda key: together[key][0].numel() % 8 > 0)  # what follows an odd size is unaligned
    flat = torch.cat([tensor.reshape(-1) for key in order for tensor in together[key]])
    sizes = [len(together[key]) * together[key][0].numel() for key in order]
    blocks = {
        key: part.view(len(together[key]), *together[key][0].shape)
        for key, part in zip(order, flat.split_with_sizes(sizes), strict=True)
    }
    own_blocks = [[blocks[i, kind] for kind in range(each)] for i, (_, each) in enumerate(kinds)]
    makers: list[Any] = [_Merged] * len(merged) + [_Factored] * len(factored)
    return [make(stack, given) for make, (stack, _), given in zip(makers, kinds, own_blocks, strict=True)]


def _by_layer(blocks: Sequence[Tensor], used: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of stacked parameters, layer by layer; None for a layer that the region did not use."""
    apart = [block.contiguous().unbind(0) for block in blocks]
    return [of[i] if use else None for i, use in enumerate(used) for of in apart]


class _Merged:
    """A stack of merged layers: weights W + scale * (rows x columns), the columns made of all but the first factor.

    Letters below: n a layer, r, w, s ranks of the rows, of the wide mode and of all small ones; y, x, z their sizes.
    """

    def __init__(self, kind: Merged, blocks: Sequence[Tensor]) -> None:
        self.count, shape, ranks, modes, stored, scale, dtype = kind
        described = AdaptedWeight("weight", stored, shape, kinds=())
        self.stack = stack = Stack((), "", described, ranks, scale, dtype, modes, dense=True)
        factors = dict(zip(sorted(modes), blocks[1:], strict=True))
        self.rows, self.wide = factors[modes[0]], None if stack.wide is None else factors[stack.wide]
        self.small = [factors[mode] for mode in stack.small]
        core = blocks[0].permute(0, *(1 + mode for mode in stack.core_order))
        self.core = core.reshape(self.count, ranks[modes[0]], -1, math.prod(ranks[mode] for mode in stack.small))
        self.kronecker = _kronecker(self.small)
        self.inner = self.core
        if self.kronecker is not None:
            self.inner = torch.einsum("nrws,nzs->nrwz", self.core, self.kronecker)
        self.places = "xz" if stack.modes[1:2] == (stack.wide,) else "zx"  # of the columns, as in memory
        columns = self.inner
        if self.wide is not None:
            columns = torch.einsum(f"nrwz,nxw->nr{self.places}", self.inner, self.wide)
        self.columns = columns.reshape(self.count, ranks[modes[0]], -1)

    def outputs(self, bases: Sequence[Tensor]) -> list[Tensor]:
        """The weights, rounded once."""
        updates = self.stack.unstack(self.rows @ (self.columns * self.stack.scale))
        return [(base + update).to(self.stack.dtype) for base, update in zip(bases, updates, strict=True)]

    def gradients(self, received: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Of cores and factors from those of the weights, the largest two products in the dtype of the weights."""
        stack, used = self.stack, [gradient is not None for gradient in received]
        if not any(used):
            return [None for _ in range(self.count * (1 + len(stack.modes)))]
        gradient = gather(stack, _filled(received, stack.described.weight_shape, stack.dtype))
        exact = self.core.dtype
        of = {stack.modes[0]: (gradient @ self.columns.to(gradient.dtype).mT).to(exact) * stack.scale}
        columns = (self.rows.to(gradient.dtype).mT @ gradient).to(exact) * stack.scale
        inner = columns.view(self.inner.shape) if self.wide is None else self._from_columns(columns, of)
        if self.kronecker is not None:
            positions = torch.einsum("nrwz,nrws->nzs", inner, self.core)
            of |= dict(zip(stack.small, _of_each(positions, self.small), strict=True))
            inner = torch.einsum("nrwz,nzs->nrws", inner, self.kronecker)
        core = inner.reshape(self.count, *(stack.ranks[mode] for mode in stack.core_order))
        core = core.permute(0, *(1 + stack.core_order.index(mode) for mode in range(len(stack.ranks))))
        return _by_layer([core, *(of[mode] for mode in sorted(stack.modes))], used)

    def _from_columns(self, columns: Tensor, of: dict[int, Tensor]) -> Tensor:
        """The gradient of what the wide factor is multiplied with; notes that of the factor."""
        assert self.wide is not None
        assert self.stack.wide is not None
        sizes = {"x": self.wide.shape[1], "z": self.inner.shape[3]}
        columns = columns.view(*self.inner.shape[:2], *(sizes[place] for place in self.places))
        of[self.stack.wide] = torch.einsum(f"nr{self.places},nrwz->nxw", columns, self.inner)
        return torch.einsum(f"nr{self.places},nxw->nrwz", columns, self.wide)


class _Factored:
    """A stack of factored layers, and their two thin matrices."""

    def __init__(self, kind: Factored, blocks: Sequence[Tensor]) -> None:
        self.count, rows, scale, dtype = kind
        self.stack = FactoredStack((), "", "rows" if rows else "columns", scale, dtype)
        self.blocks = blocks  # cores, factors of the rows, factors of the columns
        self.matrices = self.stack.matrices(*blocks)

    def outputs(self) -> tuple[list[Tensor], list[Tensor]]:
        """The left matrices and the right ones."""
        left, right = (list(side.to(self.stack.dtype, copy=True).unbind(0)) for side in self.matrices)
        return left, right

    def gradients(self, lefts: Sequence[Tensor | None], rights: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Of cores and factors from those of the matrices."""
        used = [left is not None or right is not None for left, right in zip(lefts, rights, strict=True)]
        if not any(used):
            return [None for _ in range(3 * self.count)]
        exact, dtype = self.blocks[0].dtype, self.stack.dtype
        given = [
            torch.stack(_filled(side, matrices.shape[1:], dtype, self.blocks[0])).to(exact)
            for side, matrices in zip((lefts, rights), self.matrices, strict=True)
        ]
        return _by_layer(self.stack.gradients(*self.blocks, *given), used)


def _filled(
    gradients: Sequence[Tensor | None], shape: Sequence[int], dtype: torch.dtype, like: Tensor | None = None
) -> list[Tensor]:
    """The gradients, zeros for those of layers that the region did not use."""
    like = next((gradient for gradient in gradients if gradient is not None), like)
    assert like is not None
    zeros = like.new_zeros((), dtype=dtype).expand(tuple(shape))
    return [zeros if gradient is None else gradient for gradient in gradients]


def _kronecker(factors: Sequence[Tensor]) -> Tensor | None:
    """Per layer, all products of rows and of columns of the factors, those of the last changing fastest."""
    product = None
    for factor in factors:
        if product is None:
            product = factor
        else:
            both = product[:, :, None, :, None] * factor[:, None, :, None, :]
            product = both.flatten(3).flatten(1, 2)
    return product


def _of_each(gradient: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of factors from that of ``_kronecker`` of them."""
    if len(factors) == 1:
        return [gradient]
    sizes, ranks = ([factor.shape[dim] for factor in factors] for dim in (1, 2))
    spread = gradient.view(len(gradient), *sizes, *ranks)
    letters = list(zip("abcde", "vwxyz", strict=True))[: len(factors)]
    whole = "n" + "".join(size for size, _ in letters) + "".join(rank for _, rank in letters)
    found = []
    for i, (size, rank) in enumerate(letters):
        others = [f"n{d}{r}" for k, (d, r) in enumerate(letters) if k != i]
        rest = [factor for k, factor in enumerate(factors) if k != i]
        found.append(torch.einsum(f"{','.join([whole, *others])}->n{size}{rank}", spread, *rest))
    return found
