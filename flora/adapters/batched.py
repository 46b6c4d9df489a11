"""Adapted weights built together: same-shaped layers share their contractions, once per forward pass of a model.

Layer by layer, an adapter is bound by launching many tiny kernels. Here the cores and factors of all layers of one
shape are stacked, contracted with a leading batch dimension (small modes first), and added to the frozen weights in the
dtype that the layers compute in; each layer then runs once with its W + delta. The backward pass stacks the gradients
of these weights in the same way. No second copy of the frozen weights outlives the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flora.adapters.layer import FloraLayer, compute_dtype, in_transform
from flora.adapters.tucker import factor_modes, mode_product, to_tensor
from flora.adapters.weights import AdaptedWeight

try:
    from flora.adapters import kernels
except ImportError:  # Triton comes with torch for CUDA and ROCm only
    kernels = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Stack:
    """Layers whose weights have one shape, one set of ranks and one scale, and are built together.

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
    def order(self) -> tuple[int, ...]:
        """All modes, those without a factor last."""
        return (*self.modes, *(mode for mode in range(len(self.ranks)) if mode not in self.modes))

    @cached_property
    def in_order(self) -> bool:
        """Whether memory order is that of the stored weight."""
        return list(self.modes) == sorted(self.modes)

    def parameters(self) -> list[Tensor]:
        """The cores of the layers, then their factors, mode by mode; those of today, as training may replace them."""
        cores = [layer.tucker_core[self.adapter]._parameters["weight"] for layer in self.layers]
        held = [layer.tucker_factors[self.adapter]._parameters for layer in self.layers]
        return [*cores, *(factors[f"weight_{mode}"] for mode in self.modes for factors in held)]  # type: ignore[list-item]

    def stack(self, parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Cores as [n, r...] and factors as [n, d, r], in memory order."""
        n = len(self.layers)
        cores, *factors = (torch.stack(list(parameters[i : i + n])) for i in range(0, len(parameters), n))
        cores = cores.permute(0, *(1 + mode for mode in self.order))
        return cores.reshape(n, *(self.ranks[mode] for mode in self.modes)), factors

    def unstack(self, weights: Tensor) -> Sequence[Tensor]:
        """The weights of the layers, in their stored shape, as views of [n, d...] in memory order."""
        if self.in_order:
            return weights.view(-1, *self.described.weight_shape).unbind(0)
        sizes = (self.described.shape[mode] for mode in self.order)
        places = (1 + self.order.index(mode) for mode in range(len(self.order)))
        return weights.view(-1, *sizes).permute(0, *places).unbind(0)

    def gather(self, weights: Sequence[Tensor]) -> Tensor:
        """The inverse of ``unstack``: [n, d...] in memory order, copied."""
        seen = weights if self.in_order else [weight.permute(self.order) for weight in weights]
        return torch.stack(list(seen)).view(-1, *(self.described.shape[mode] for mode in self.modes))

    def add(self, left: Tensor, right: Tensor) -> Sequence[Tensor]:
        """Base weights plus ``scale`` times the products [n, d_1, r] x [n, r, rest], rounded once, to ``dtype``."""
        bases = [layer.base_layer._parameters["weight"] for layer in self.layers]
        if left.is_cuda and self.dense and left.dtype == torch.float32 and left.shape[2] <= 128 and kernels is not None:
            return self.unstack(kernels.add_products(bases, left, right, self.scale, self.dtype))
        sums = left @ (right if self.scale == 1 else right * self.scale)
        torch._foreach_add_(list(self.unstack(sums)), bases)
        return self.unstack(sums.to(self.dtype))


class _Build(torch.autograd.Function):
    """The weights of a stack from its cores and factors."""

    @staticmethod
    def forward(ctx: Any, stack: Stack, *parameters: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(parameters[0].device.type, enabled=False):
            partial, factors = stack.stack(parameters)
            # The first mode, the outputs, comes last: until then everything is small.
            steps = []
            for mode in range(len(factors) - 1, 0, -1):
                steps.append((mode, partial))
                partial = mode_product(partial, factors[mode], mode)
            ctx.stack, ctx.steps, ctx.partial, ctx.factors = stack, steps, partial, factors
            ctx.save_for_backward(*parameters)
            return tuple(stack.add(factors[0], partial.reshape(*partial.shape[:2], -1)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        stack: Stack = ctx.stack
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted, which the fast path below does not record
            built = _differentiable(stack, ctx.saved_tensors)
            return None, *torch.autograd.grad(built, ctx.saved_tensors, gradients, create_graph=True)
        with torch.autocast(gradients[0].device.type, enabled=False):
            gradient = stack.gather(gradients)
            exact, fast = ctx.partial.dtype, gradient.dtype
            found: list[Tensor] = [_factor_gradient(gradient, ctx.partial.to(fast), 0).to(exact)]
            gradient = mode_product(gradient, ctx.factors[0].to(fast).mT, 0).to(exact)
            for mode, before in reversed(ctx.steps):
                found.append(_factor_gradient(gradient, before, mode))
                gradient = mode_product(gradient, ctx.factors[mode].mT, mode)
            if stack.scale != 1:
                gradient = gradient * stack.scale
                found = [one * stack.scale for one in found]
            n = len(stack.layers)
            ranks = [stack.ranks[mode] for mode in stack.order]
            back = [1 + stack.order.index(mode) for mode in range(len(stack.order))]
            cores = gradient.reshape(n, *ranks).permute(0, *back)
            return None, *cores.unbind(0), *(one for factor in found for one in factor.unbind(0))


def _factor_gradient(gradient: Tensor, before: Tensor, mode: int) -> Tensor:
    """Gradient [n, d, r] of a factor from that of ``mode_product(before, factor, mode)``."""
    n, d, r = len(gradient), gradient.shape[mode + 1], before.shape[mode + 1]
    if mode == 0:
        return gradient.reshape(n, d, -1) @ before.reshape(n, r, -1).mT
    if mode == gradient.dim() - 2:
        return gradient.reshape(n, -1, d).mT @ before.reshape(n, -1, r)
    return gradient.movedim(mode + 1, 1).flatten(2) @ before.movedim(mode + 1, 1).flatten(2).mT


def _differentiable(stack: Stack, parameters: Sequence[Tensor]) -> list[Tensor]:
    cores, factors = stack.stack(parameters)
    updates = stack.unstack((to_tensor(cores, factors) * stack.scale).contiguous())
    bases = (layer.base_weight("weight") for layer in stack.layers)
    return [(base + update).to(stack.dtype) for base, update in zip(bases, updates, strict=True)]


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
        self._stacks: list[Stack] = []
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
            self._stacks = plan(self.layers)
            self._devices = {layer.base_weight("weight").device.type for layer in self.layers}
            self._planned_for = signature, {device: _autocast(device) for device in self._devices}
        self._with_gradient = torch.is_grad_enabled()
        for stack in self._stacks:
            parameters = stack.parameters()
            if not any(isinstance(p, DTensor) or p.numel() == 0 for p in parameters):
                weights = _Build.apply(stack, *parameters)
                self._built.update(zip(map(id, stack.layers), weights, strict=True))

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._depth -= 1
        if self._depth == 0 and not self._with_gradient:
            self._built = {}


def plan(layers: Sequence[FloraLayer]) -> list[Stack]:
    """The stacks in which the layers' weights are built, as the layers stand now; some layers may be in none."""
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
        found.setdefault((*key, weight.device), []).append(layer)
    return [Stack(tuple(members), *key[:-1]) for key, members in found.items()]


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
