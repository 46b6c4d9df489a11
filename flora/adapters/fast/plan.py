"""Layers whose weights are built together, and the order in which their adapters lie in one flat buffer."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flora.adapters.layer import FloraLayer
from flora.adapters.tucker import factor_modes, to_tensor
from flora.replaced.precision import compute_dtype
from flora.replaced.weights import AdaptedWeight

# Layers that do nothing with their bias but add it.
_PLAIN = {kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}
_SMALL = 1024  # most positions of the small modes: their Kronecker product is built


@dataclass(frozen=True, eq=False)
class Stack:
    """Layers whose weights have one shape, one set of ranks and one scale, and are built together.

    The weight of a layer is seen as rows (its first mode in memory), a wide mode (the larger of the second and the
    last) and small modes (kernel positions).

    Attributes:
        layers: n layers, each with one adapted weight called ``weight``.
        adapter: the active adapter of all of them.
        described: their weight.
        ranks: its rank per mode.
        scale: factor of the update.
        dtype: of the weights that are built.
        modes: modes that carry a factor, in the order in which the weights lie in memory.
        dense: whether the base weights lie in memory without gaps.
    """

    layers: tuple[FloraLayer, ...]
    adapter: str
    described: AdaptedWeight
    ranks: tuple[int, ...]
    scale: float
    dtype: torch.dtype
    modes: tuple[int, ...]
    dense: bool

    @cached_property
    def wide(self) -> int | None:
        """The wide mode; None for a weight of one mode."""
        ends = {self.modes[1], self.modes[-1]} if len(self.modes) > 1 else {}
        return max(sorted(ends), key=lambda mode: self.described.shape[mode], default=None)

    @cached_property
    def small(self) -> tuple[int, ...]:
        """The small modes."""
        return tuple(mode for mode in self.modes[1:] if mode != self.wide)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """All modes in memory order, those without a factor last."""
        return (*self.modes, *(mode for mode in range(len(self.ranks)) if mode not in self.modes))

    @cached_property
    def outer(self) -> tuple[int, ...]:
        """The rows and, if there is one, the wide mode."""
        return self.modes[:1] if self.wide is None else (self.modes[0], self.wide)

    @cached_property
    def core_order(self) -> tuple[int, ...]:
        """All modes as the contractions take the core: outer, small, and those without a factor."""
        named = (*self.outer, *self.small)
        return (*named, *(mode for mode in range(len(self.ranks)) if mode not in named))

    @cached_property
    def in_order(self) -> bool:
        """Whether memory order is that of the stored weight."""
        return list(self.modes) == sorted(self.modes)

    @cached_property
    def family(self) -> tuple[Any, ...]:
        """What stacks share whose cores are contracted with the factors of their small modes together."""
        sizes = tuple(self.described.shape[mode] for mode in self.small)
        return sizes, self.ranks, self.modes[0], self.wide, self.small, self.scale

    def sizes(self, modes: Iterable[int]) -> list[int]:
        """Sizes of some modes."""
        return [self.described.shape[mode] for mode in modes]

    def unstack(self, weights: Tensor) -> Sequence[Tensor]:
        """The weights of the layers, in their stored shape, as views of [n, d...] in memory order."""
        if self.in_order:
            return weights.view(-1, *self.described.weight_shape).unbind(0)
        places = (1 + self.order.index(mode) for mode in range(len(self.order)))
        return weights.view(-1, *self.sizes(self.order)).permute(0, *places).unbind(0)


class Block(NamedTuple):
    """Same-shaped parameters that lie one after the other in a plan's flat buffer: a core, or factors of one mode."""

    stacks: tuple[Stack, ...]
    mode: int | None
    shape: tuple[int, ...]

    def places(self) -> list[tuple[dict[str, Any], str]]:
        """Where the parameters lie, layer by layer: the dict that holds each, and its key in it."""
        layers = [(layer, stack.adapter) for stack in self.stacks for layer in stack.layers]
        if self.mode is None:
            return [(layer.tucker_core[adapter]._parameters, "weight") for layer, adapter in layers]
        return [(layer.tucker_factors[adapter]._parameters, f"weight_{self.mode}") for layer, adapter in layers]


class Plan:
    """Stacks on one device whose adapters have one dtype, and the order of their parameters in a flat buffer.

    Attributes:
        families: stacks whose cores are contracted with the factors of their small modes together.
        stacks: all of them, family by family.
        blocks: same-shaped parameters, in the order of the flat buffer.
        index: of the block of a stack's core (mode None) or factor; what a family shares is that of its first stack.
        views, sizes: of the blocks, [n, r...] or [n, d, r].
    """

    def __init__(self, stacks: Sequence[Stack]) -> None:
        families: dict[tuple[Any, ...], list[Stack]] = {}
        for stack in stacks:
            families.setdefault(stack.family, []).append(stack)
        self.families = [tuple(members) for members in families.values()]
        self.stacks = [stack for members in self.families for stack in members]
        self.blocks: list[Block] = []
        for members in self.families:
            first = members[0]
            self.blocks.append(Block(members, None, first.ranks))
            for mode in first.small:
                self.blocks.append(Block(members, mode, (first.described.shape[mode], first.ranks[mode])))
        for stack in self.stacks:
            for mode in stack.outer:
                self.blocks.append(Block((stack,), mode, (stack.described.shape[mode], stack.ranks[mode])))
        self.blocks.sort(key=lambda block: math.prod(block.shape) % 8 > 0)  # what follows an odd size is not aligned
        self._plain: dict[torch.dtype, list[tuple[int, nn.Module]]] = {}
        for i, (layer, dtype) in enumerate((layer, stack.dtype) for stack in self.stacks for layer in stack.layers):
            if type(layer.base_layer).forward in _PLAIN:
                self._plain.setdefault(dtype, []).append((i, layer.base_layer))
        self._places = [place for block in self.blocks for place in block.places()]
        number = {layer: i for i, layer in enumerate(layer for stack in self.stacks for layer in stack.layers)}
        self._owners = [number[layer] for block in self.blocks for stack in block.stacks for layer in stack.layers]
        counts = [sum(len(stack.layers) for stack in block.stacks) for block in self.blocks]
        self.views = [(count, *block.shape) for count, block in zip(counts, self.blocks, strict=True)]
        self.sizes = [math.prod(view) for view in self.views]
        self.index = {(block.stacks[0], block.mode): i for i, block in enumerate(self.blocks)}

    def parameters(self) -> list[Tensor]:
        """What the adapters hold today, in the order of the blocks."""
        return [parameters[key] for parameters, key in self._places]

    def split(self, flat: Tensor) -> list[Tensor]:
        """The blocks of a flat buffer: cores as [n, r...], factors as [n, d, r]."""
        return [part.view(view) for part, view in zip(flat.split_with_sizes(self.sizes), self.views, strict=True)]

    def given(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """The gradients of the weights, zeros for those of layers that the pass did not use."""
        if all(gradient is not None for gradient in gradients):
            return list(gradients)  # type: ignore[arg-type]
        like = next(gradient for gradient in gradients if gradient is not None)
        shapes = [(stack.described.weight_shape, stack.dtype) for stack in self.stacks for _ in stack.layers]
        return [
            like.new_zeros(()).to(dtype).expand(shape) if gradient is None else gradient
            for gradient, (shape, dtype) in zip(gradients, shapes, strict=True)
        ]

    def wanted(self, results: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of the parameters, None for those of layers that the pass did not use."""
        return [
            None if gradients[owner] is None else result for result, owner in zip(results, self._owners, strict=True)
        ]

    def build(self, parameters: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """What the layers run with, stack by stack, in the dtype that they compute in: weight, perhaps bias."""
        prepared = [{"weight": weight} for weight in self.merge(parameters)]
        for dtype, places in self._plain.items():
            biases = [(i, layer._parameters.get("bias")) for i, layer in places]
            fixed = [(i, bias) for i, bias in biases if bias is not None and _only_converted(bias, dtype)]
            if fixed:  # all at once rather than in a launch each
                together = torch.cat([bias for _, bias in fixed]).to(dtype)
                parts = together.split_with_sizes([len(bias) for _, bias in fixed])
                for (i, _), part in zip(fixed, parts, strict=True):
                    prepared[i]["bias"] = part
        return prepared

    def merge(self, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The weights of the layers, stack by stack, in the dtype that they compute in; differentiable."""
        raise NotImplementedError

    def differentiable_gradients(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """Gradients of the parameters from those of the weights, recorded so that they can be differentiated again."""
        blocks = self.split(torch._C._nn.flatten_dense_tensors(list(parameters)))
        weights: list[Tensor] = []
        for members in self.families:
            start = 0
            for stack in members:
                n, first = len(stack.layers), members[0]
                core = blocks[self.index[first, None]][start : start + n].permute(
                    0, *(1 + mode for mode in stack.order)
                )
                factors: list[Tensor] = []
                for mode in stack.modes:
                    shared = mode in stack.small
                    block = blocks[self.index[first if shared else stack, mode]]
                    factors.append(block[start : start + n] if shared else block)
                core = core.reshape(n, *(stack.ranks[mode] for mode in stack.modes))
                updates = stack.unstack((to_tensor(core, factors) * stack.scale).contiguous())
                bases = (layer.base_weight("weight") for layer in stack.layers)
                weights += [(base + update).to(stack.dtype) for base, update in zip(bases, updates, strict=True)]
                start += n
        return torch.autograd.grad(weights, list(parameters), list(gradients), create_graph=True)


def _only_converted(bias: Tensor, dtype: torch.dtype) -> bool:
    return type(bias) is nn.Parameter and not bias.requires_grad and bias.dtype == torch.float32 != dtype


def capturing(tensor: Tensor) -> bool:
    """Whether what is launched on the tensor's device now goes into a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def stacks(layers: Sequence[FloraLayer]) -> list[Stack]:
    """Which of the layers are built together, as they stand now; some may be in no stack."""
    groups: dict[tuple[Any, ...], list[FloraLayer]] = {}
    for layer in layers:
        adapters = layer._present(layer.active_adapters)
        if layer.disable_adapters or layer.merged or len(adapters) != 1 or adapters[0] in layer.tucker_magnitude:
            continue
        (adapter,) = adapters
        described, ranks = layer.weights[adapter]["weight"], layer.effective_ranks[adapter]["weight"]
        weight = layer.base_layer._parameters.get("weight")
        if weight is None or not _at_hand(weight, described) or layer.form_for(adapters) != "merged":
            continue
        if not layer.stackable or isinstance(layer.scaling[adapter], Tensor):  # now; a tensor may change in place
            continue
        modes = factor_modes(described.shape, ranks)
        core = layer.core(adapter)
        if not modes or torch.promote_types(core.dtype, weight.dtype) != core.dtype:
            continue  # in the adapter's dtype, the sum would round the base weight
        channels_last = _channels_last(weight) and not described.folded
        if channels_last:
            modes = (*(m for m in modes if m != 1), *(m for m in modes if m == 1))
        sizes = [described.shape[mode] for mode in modes[1:]] or [1]
        if math.prod(sizes) > _SMALL * max(sizes[0], sizes[-1]):  # what is left but for the wide mode
            continue
        dense = channels_last or weight.is_contiguous()
        key = (adapter, described, ranks, layer.scaling[adapter], compute_dtype(weight), modes, dense)
        groups.setdefault((*key, weight.device, core.device, core.dtype), []).append(layer)
    return [Stack(tuple(members), *key[:-3]) for key, members in groups.items()]


def _at_hand(weight: Tensor, described: AdaptedWeight) -> bool:
    """Whether the weight is frozen and here as a whole: not sharded, partitioned, quantised, or on the meta device."""
    whole = weight.shape == described.weight_shape and not isinstance(weight, DTensor) and not weight.is_meta
    return whole and weight.is_floating_point() and not weight.requires_grad


def _channels_last(weight: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if weight.dim() not in formats or weight.is_contiguous():
        return False
    return weight.is_contiguous(memory_format=formats[weight.dim()])
