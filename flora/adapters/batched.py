"""Adapted weights built together: same-shaped layers share their contractions, once per forward pass of a model.

Layer by layer, an adapter is bound by launching many tiny kernels. Here the cores and factors of all layers of one
shape are stacked, contracted with a leading batch dimension (small modes first), and added to the frozen weights in the
dtype that the layers compute in; each layer then runs once with its W + delta. The backward pass stacks the gradients
of these weights in the same way. No second copy of the frozen weights outlives the step.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flora.adapters.layer import FloraLayer, compute_dtype, in_transform
from flora.adapters.tucker import factor_modes, to_tensor
from flora.adapters.weights import AdaptedWeight

try:
    from flora.adapters import kernels
except ImportError:  # Triton comes with torch for CUDA and ROCm only
    kernels = None  # type: ignore[assignment]


_SMALL = 1024  # most positions of the small modes: their Kronecker product is built


@dataclass(frozen=True, eq=False)
class Stack:
    """Layers whose weights have one shape, one set of ranks and one scale, and are built together.

    The weight of a layer is seen as rows (its first mode in memory), a wide mode (the largest of the others) and small
    modes (kernel positions).

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
        return max(self.modes[1:], key=lambda mode: self.described.shape[mode], default=None)

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

    def gather(self, weights: Sequence[Tensor]) -> Tensor:
        """The inverse of ``unstack``, copied: [n, rows, rest] in memory order."""
        seen = weights if self.in_order else [weight.permute(self.order) for weight in weights]
        return torch.stack(list(seen)).reshape(len(weights), self.described.shape[self.modes[0]], -1)

    def add(self, left: Tensor, right: Tensor) -> Sequence[Tensor]:
        """Base weights plus ``scale`` times the products [n, rows, r] x [n, r, rest], rounded once, to ``dtype``."""
        bases = [layer.base_layer._parameters["weight"] for layer in self.layers]
        if left.is_cuda and self.dense and left.dtype == torch.float32 and left.shape[2] <= 128 and kernels is not None:
            return self.unstack(kernels.add_products(bases, left, right, self.scale, self.dtype))
        sums = left @ (right if self.scale == 1 else right * self.scale)
        torch._foreach_add_(list(self.unstack(sums)), bases)
        return self.unstack(sums.to(self.dtype))

    def turn(self, inner: Tensor) -> Tensor:
        """[n, r_1 * r_wide, small] to [n, r_1 * small, r_wide]."""
        if self.wide is None or not self.small:
            return inner.view(len(inner), self.ranks[self.modes[0]], -1)
        n, rank = len(inner), self.ranks[self.wide]
        return inner.view(n, self.ranks[self.modes[0]], rank, -1).transpose(2, 3).reshape(n, -1, rank)

    def turn_back(self, turned: Tensor) -> Tensor:
        """The inverse of ``turn``."""
        n, first = len(turned), self.ranks[self.modes[0]]
        if self.wide is None or not self.small:
            return turned.reshape(n, -1, 1)
        rank = self.ranks[self.wide]
        return turned.view(n, first, -1, rank).transpose(2, 3).reshape(n, first * rank, -1)

    def to_columns(self, turned: Tensor, factor: Tensor, out: Tensor) -> None:
        """[n, r_1 * small, r_wide] times the factor [n, wide, r_wide], into [n, r_1, rest] in memory order."""
        n, first = len(turned), self.ranks[self.modes[0]]
        seen = (*self.small, self.wide)
        if self.modes[1:] == seen:
            torch.bmm(turned, factor.mT, out=out.view(n, -1, factor.shape[1]))
            return
        product = (turned @ factor.mT).view(n, first, *self.sizes(seen))  # type: ignore[arg-type]
        places = [2 + seen.index(mode) for mode in self.modes[1:]]
        out.view(n, first, *self.sizes(self.modes[1:])).copy_(product.permute(0, 1, *places))

    def from_columns(self, gradient: Tensor) -> Tensor:
        """[n, r_1, rest] in memory order to [n, r_1 * small, wide]."""
        n, first = len(self.layers), self.ranks[self.modes[0]]
        if self.wide is None:
            return gradient
        seen = (*self.small, self.wide)
        if self.modes[1:] != seen:
            places = [2 + self.modes[1:].index(mode) for mode in seen]
            gradient = gradient.view(n, first, *self.sizes(self.modes[1:])).permute(0, 1, *places)
        return gradient.reshape(n, -1, self.described.shape[self.wide])


class Block(NamedTuple):
    """Same-shaped parameters that lie one after the other in a plan's flat buffer: a core, or factors of one mode."""

    stacks: tuple[Stack, ...]
    mode: int | None
    shape: tuple[int, ...]

    def held(self) -> list[tuple[dict[str, Any], str]]:
        """Where the parameters are found, layer by layer."""
        layers = [(layer, stack.adapter) for stack in self.stacks for layer in stack.layers]
        if self.mode is None:
            return [(layer.tucker_core[adapter]._parameters, "weight") for layer, adapter in layers]
        return [(layer.tucker_factors[adapter]._parameters, f"weight_{self.mode}") for layer, adapter in layers]


class Plan:
    """Stacks on one device whose adapters have one dtype, and the order of their parameters in a flat buffer."""

    def __init__(self, stacks: Sequence[Stack]) -> None:
        families: dict[tuple[Any, ...], list[Stack]] = {}
        for stack in stacks:
            families.setdefault(stack.family, []).append(stack)
        self.families = [tuple(members) for members in families.values()]
        self.stacks = [stack for members in self.families for stack in members]
        self.blocks: list[Block] = []
        for members in self.families:
            one = members[0]
            self.blocks.append(Block(members, None, one.ranks))
            for mode in one.small:
                self.blocks.append(Block(members, mode, (one.described.shape[mode], one.ranks[mode])))
        for stack in self.stacks:
            for mode in stack.outer:
                self.blocks.append(Block((stack,), mode, (stack.described.shape[mode], stack.ranks[mode])))
        self._held = [place for block in self.blocks for place in block.held()]
        counts = [sum(len(stack.layers) for stack in block.stacks) for block in self.blocks]
        self._views = [(count, *block.shape) for count, block in zip(counts, self.blocks, strict=True)]
        self._sizes = [math.prod(view) for view in self._views]
        self._columns = [
            (len(stack.layers), stack.ranks[stack.modes[0]], math.prod(stack.sizes(stack.modes[1:])))
            for stack in self.stacks
        ]
        self.columns = sum(math.prod(shape) for shape in self._columns)
        self.index = {(block.stacks[0], block.mode): i for i, block in enumerate(self.blocks)}

    def parameters(self) -> list[Tensor]:
        """What the adapters hold today, in the order of the blocks."""
        return [held[key] for held, key in self._held]

    def split(self, flat: Tensor) -> list[Tensor]:
        """The blocks of a flat buffer: cores as [n, r...], factors as [n, d, r]."""
        return [part.view(view) for part, view in zip(flat.split_with_sizes(self._sizes), self._views, strict=True)]

    def split_columns(self, flat: Tensor) -> list[Tensor]:
        """Per stack [n, r_1, rest], views of a flat buffer of ``columns`` numbers."""
        parts = flat.split_with_sizes([math.prod(shape) for shape in self._columns])
        return [part.view(shape) for part, shape in zip(parts, self._columns, strict=True)]

    def small_products(self, blocks: Sequence[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
        """Per family, cores as [n, r_1 * r_wide, r_small], Kronecker products of small factors [n, small, r_small]."""
        found = []
        for members in self.families:
            one, core = members[0], blocks[self.index[members[0], None]]
            core = core.permute(0, *(1 + mode for mode in one.core_order))
            small = math.prod(one.ranks[mode] for mode in one.small)
            core = core.reshape(len(core), -1, small)
            kronecker = None
            for mode in one.small:
                factor = blocks[self.index[one, mode]]
                if kronecker is None:
                    kronecker = factor
                else:
                    product = kronecker[:, :, None, :, None] * factor[:, None, :, None, :]
                    kronecker = product.flatten(3).flatten(1, 2)
            found.append((core, kronecker))
        return found

    def cores_back(self, one: Stack, gradient: Tensor) -> Tensor:
        """The inverse of the rearrangement of cores in ``small_products``."""
        seen = gradient.reshape(len(gradient), *(one.ranks[mode] for mode in one.core_order))
        return seen.permute(0, *(1 + one.core_order.index(mode) for mode in range(len(one.ranks))))

    def factors_back(self, members: tuple[Stack, ...], blocks: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
        """Gradients of the small factors from that of their Kronecker product."""
        one = members[0]
        factors = [blocks[self.index[one, mode]] for mode in one.small]
        if len(factors) == 1:
            return [gradient]
        seen = gradient.view(len(gradient), *one.sizes(one.small), *(one.ranks[mode] for mode in one.small))
        letters = "abcde"[: len(factors)], "vwxyz"[: len(factors)]
        found = []
        for i in range(len(factors)):
            others = [f"n{d}{r}" for k, (d, r) in enumerate(zip(*letters, strict=True)) if k != i]
            equation = ",".join([f"n{letters[0]}{letters[1]}", *others])
            rest = [factor for k, factor in enumerate(factors) if k != i]
            found.append(torch.einsum(f"{equation}->n{letters[0][i]}{letters[1][i]}", seen, *rest))
        return found


class _Build(torch.autograd.Function):
    """The weights of all layers of a plan from their cores and factors."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *parameters: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(parameters[0].device.type, enabled=False):
            flat = torch._C._nn.flatten_dense_tensors(list(parameters))
            blocks = plan.split(flat)
            products, turned = plan.small_products(blocks), []
            weights: list[Tensor] = []
            columns = flat.new_empty(plan.columns)  # what the rows are multiplied with, of all stacks
            right = iter(plan.split_columns(columns))
            for members, (core, kronecker) in zip(plan.families, products, strict=True):
                inner = core if kronecker is None else core @ kronecker.mT
                for stack, part in zip(members, inner.split([len(s.layers) for s in members]), strict=True):
                    place = next(right)
                    turned.append(stack.turn(part))
                    if stack.wide is None:
                        place.copy_(part)
                    else:
                        stack.to_columns(turned[-1], blocks[plan.index[stack, stack.wide]], place)
                    weights.extend(stack.add(blocks[plan.index[stack, stack.modes[0]]], place))
            ctx.plan, ctx.flat, ctx.products, ctx.turned, ctx.columns = plan, flat, products, turned, columns
            ctx.save_for_backward(*parameters)
            return tuple(weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted, which the fast path below does not record
            built = _differentiable(plan, ctx.saved_tensors)
            return None, *torch.autograd.grad(built, ctx.saved_tensors, gradients, create_graph=True)
        with torch.autocast(gradients[0].device.type, enabled=False):
            exact = ctx.flat.dtype
            blocks = {exact: plan.split(ctx.flat)}
            right, turned = {}, {}
            for dtype in {stack.dtype for stack in plan.stacks}:  # in which weights have their gradients
                blocks[dtype] = plan.split(ctx.flat.to(dtype))
                right[dtype] = plan.split_columns(ctx.columns.to(dtype))
                turned[dtype] = _in_one_dtype(list(ctx.turned), dtype)
            found: list[Any] = [None] * len(plan.blocks)
            given, number = iter(gradients), iter(range(len(plan.stacks)))
            for members, (core, kronecker) in zip(plan.families, ctx.products, strict=True):
                to_inner = []
                for stack in members:
                    dtype, i = stack.dtype, next(number)
                    gradient = stack.gather(list(islice(given, len(stack.layers))))
                    rows = plan.index[stack, stack.modes[0]]
                    found[rows] = gradient @ right[dtype][i].mT
                    gradient = stack.from_columns(blocks[dtype][rows].mT @ gradient)
                    if stack.wide is not None:
                        wide = plan.index[stack, stack.wide]
                        found[wide] = gradient.mT @ turned[dtype][i]
                        gradient = gradient @ blocks[dtype][wide]
                    to_inner.append(stack.turn_back(gradient))
                inner, one = to_inner[0] if len(to_inner) == 1 else torch.cat(to_inner), members[0]
                if kronecker is not None:
                    inner = inner.to(exact)
                    small = plan.factors_back(members, blocks[exact], inner.mT @ core)
                    for mode, factor in zip(one.small, small, strict=True):
                        found[plan.index[one, mode]] = factor
                    inner = inner @ kronecker
                found[plan.index[one, None]] = plan.cores_back(one, inner)
            scales = [block.stacks[0].scale for block in plan.blocks]
            if set(scales) != {1.0}:
                found = [part * scale for part, scale in zip(found, scales, strict=True)]
            flat = torch._C._nn.flatten_dense_tensors(_in_one_dtype(found, exact))
            return None, *torch._C._nn.unflatten_dense_tensors(flat, ctx.saved_tensors)


def _in_one_dtype(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in one dtype, all that differ from it converted at once."""
    for other in {tensor.dtype for tensor in tensors} - {dtype}:
        places = [i for i, tensor in enumerate(tensors) if tensor.dtype == other]
        chosen = [tensors[i] for i in places]
        flat = torch._C._nn.flatten_dense_tensors(chosen).to(dtype)
        for i, tensor in zip(places, torch._C._nn.unflatten_dense_tensors(flat, chosen), strict=True):
            tensors[i] = tensor
    return tensors


def _differentiable(plan: Plan, parameters: Sequence[Tensor]) -> list[Tensor]:
    blocks = plan.split(torch._C._nn.flatten_dense_tensors(list(parameters)))
    built: list[Tensor] = []
    for members in plan.families:
        start = 0
        for stack in members:
            n, one = len(stack.layers), members[0]
            core = blocks[plan.index[one, None]][start : start + n].permute(0, *(1 + mode for mode in stack.order))
            factors: list[Tensor] = []
            for mode in stack.modes:
                shared = mode in stack.small
                block = blocks[plan.index[one if shared else stack, mode]]
                factors.append(block[start : start + n] if shared else block)
            core = core.reshape(n, *(stack.ranks[mode] for mode in stack.modes))
            updates = stack.unstack((to_tensor(core, factors) * stack.scale).contiguous())
            bases = (layer.base_weight("weight") for layer in stack.layers)
            built += [(base + update).to(stack.dtype) for base, update in zip(bases, updates, strict=True)]
            start += n
    return built


class BatchedWeights:
    """Builds the merged weights of a model's layers when its forward pass begins, and hands them out.

    Layers that it leaves out build their own: those that run factored, have several active adapters or a magnitude, and
    all layers where weights are sharded or offloaded (FSDP, DeepSpeed, accelerate), inside torch.compile (which fuses
    the layers' own contractions), under functorch transforms and in the replicas of nn.DataParallel.

    Under gradient checkpointing, the recomputation in the backward pass finds the same weights again.
    """

    def __init__(self) -> None:
        self.layers: list[FloraLayer] = []
        self._forget()

    def _forget(self) -> None:
        self._planned_for: tuple[Any, Any] | None = None
        self._devices: set[str] = set()
        self._plans: list[Plan] = []
        self._built: dict[int, Tensor] = {}
        self._depth = 0
        self._with_gradient = False

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}  # what was built belongs to one forward pass of one model

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layers = state["layers"]
        self._forget()

    def attach(self, model: nn.Module) -> None:
        """Build at the start of every forward pass of ``model``, for the adapted layers that it has now."""
        self.layers = [layer for layer in model.modules() if isinstance(layer, FloraLayer) and layer.stackable]
        for layer in self.layers:
            layer.batched = self
        self.detach(model)
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end, always_call=True)

    def detach(self, model: nn.Module) -> None:
        """Leave the model alone from now on."""
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]
        self._forget()

    def weight_of(self, layer: FloraLayer) -> Tensor | None:
        """What was built for the layer in the running forward pass, or None."""
        if torch.compiler.is_compiling() or not self._built:
            return None
        if self._depth == 0 and torch._C._current_graph_task_id() == -1:
            return None  # called past the model: parameters may have changed since
        if self._with_gradient and not torch.is_grad_enabled():
            # A checkpoint of the reentrant kind: its recomputation has a graph of its own and must not share this one.
            self._built.pop(id(layer), None)
        return self._built.get(id(layer))

    def _begin(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._depth += 1
        if self._depth > 1:
            return
        self._built = {}
        if getattr(model, "_is_replica", False) or in_transform():
            return
        signature = [_signature(layer) for layer in self.layers]
        casts = {device: _autocast(device) for device in self._devices}
        if (signature, casts) != self._planned_for:
            self._plans = plans(self.layers)
            self._devices = {layer.base_weight("weight").device.type for layer in self.layers}
            self._planned_for = signature, {device: _autocast(device) for device in self._devices}
        self._with_gradient = torch.is_grad_enabled()
        for plan in self._plans:
            parameters = plan.parameters()
            if not any(isinstance(p, DTensor) or p.numel() == 0 for p in parameters):
                weights = _Build.apply(plan, *parameters)
                self._built.update(zip((id(layer) for s in plan.stacks for layer in s.layers), weights, strict=True))

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._depth -= 1
        if self._depth == 0 and not self._with_gradient:
            self._built = {}


def stacks(layers: Sequence[FloraLayer]) -> list[Stack]:
    """Which of the layers are built together, as they stand now; some may be in no stack."""
    found: dict[tuple[Any, ...], list[FloraLayer]] = {}
    for layer in layers:
        adapters = layer._present(layer.active_adapters)
        if layer.disable_adapters or layer.merged or len(adapters) != 1 or adapters[0] in layer.tucker_magnitude:
            continue
        (adapter,) = adapters
        described, ranks = layer.weights[adapter]["weight"], layer.effective_ranks[adapter]["weight"]
        weight = layer.base_layer._parameters.get("weight")
        if weight is None or not _at_hand(weight, described) or layer.adds(adapters):
            continue
        modes = factor_modes(described.shape, ranks)
        if not modes:
            continue
        channels_last = _channels_last(weight) and not described.folded
        if channels_last:
            modes = (*(m for m in modes if m != 1), *(m for m in modes if m == 1))
        dense = channels_last or weight.is_contiguous()
        key = (adapter, described, ranks, layer.scaling[adapter], compute_dtype(weight), modes, dense)
        core = layer.core(adapter)
        found.setdefault((*key, weight.device, core.device, core.dtype), []).append(layer)
    made = [Stack(tuple(members), *key[:-3]) for key, members in found.items()]
    return [stack for stack in made if math.prod(stack.sizes(stack.small)) <= _SMALL]


def plans(layers: Sequence[FloraLayer]) -> list[Plan]:
    """How the layers' weights are built, as the layers stand now: a plan for each device and dtype of adapters."""
    places: dict[Any, list[Stack]] = {}
    for stack in stacks(layers):
        layer = stack.layers[0]
        core = layer.core(stack.adapter)
        places.setdefault((layer.base_weight("weight").device, core.device, core.dtype), []).append(stack)
    return [Plan(members) for members in places.values()]


def _at_hand(weight: Tensor, described: AdaptedWeight) -> bool:
    """Whether the weight is frozen and here as a whole: not sharded, partitioned, quantised, or on the meta device."""
    whole = weight.shape == described.weight_shape and not isinstance(weight, DTensor) and not weight.is_meta
    return whole and weight.is_floating_point() and not weight.requires_grad


def _channels_last(weight: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if weight.dim() not in formats or weight.is_contiguous():
        return False
    return weight.is_contiguous(memory_format=formats[weight.dim()])


def _autocast(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _signature(layer: FloraLayer) -> tuple[Any, ...]:
    """What ``plan`` depends on besides autocast, cheap enough for every forward pass."""
    own = layer.__dict__  # past nn.Module's attribute lookup
    active = own["_active_adapter"]
    weight = own["_modules"]["base_layer"]._parameters.get("weight")
    state = (
        own["revision"],
        own["training"],
        own["_disable_adapters"],
        len(own["merged_adapters"]),
        active if isinstance(active, str) else tuple(active),
        *own["scaling"].values(),
    )
    if weight is None:
        return state
    return (*state, type(weight), weight.dtype, weight.device, weight.requires_grad, weight.numel())
