"""Weights built for many layers together, once per forward pass of a model, rather than layer by layer.

Layer by layer, an adapter is bound by launching many tiny kernels. Here the cores and factors of all layers of one
shape are stacked, contracted with a leading batch dimension (small modes first), and added to the frozen weights in the
dtype that the layers compute in; each layer then runs once with its W + delta. The backward pass goes the same way.
On a GPU, stacks of all shapes share their launches too. No second copy of the frozen weights outlives the step.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flora.adapters.fast.factored_plan import FactoredPlan, factored_stacks
from flora.adapters.fast.plan import Plan, capturing, stacks
from flora.adapters.fast.torch_plan import TorchPlan
from flora.adapters.layer import FloraLayer
from flora.replaced.bases import stored
from flora.replaced.layer import in_transform

try:
    from flora.adapters.fast.triton_kernel import INTERPRETED
    from flora.adapters.fast.triton_plan import TritonPlan, takes
except ImportError:  # Triton comes with torch for CUDA and ROCm only
    TritonPlan, INTERPRETED = None, False  # type: ignore[assignment,misc]


# What a layer runs with: merged, its weight, perhaps with its bias; factored, its two thin matrices.
Prepared = dict[str, Tensor] | tuple[Tensor, Tensor]


class Builder:
    """Builds what a model's layers run with when its forward pass begins, and hands it out.

    Merged layers are handed their weights, factored ones their two thin matrices. Layers that are left out build their
    own: those with several active adapters or a magnitude, dense ones, factored convolutions, folded ones that run
    factored, and all layers where weights are sharded or offloaded (FSDP, DeepSpeed, accelerate), where cores and
    factors differ in dtype, inside torch.compile (which fuses the layers' own contractions), under functorch transforms
    and in the replicas of nn.DataParallel.

    Under gradient checkpointing, the recomputation in the backward pass finds the same weights again.
    """

    def __init__(self) -> None:
        self.layers: list[FloraLayer] = []
        self._captured: list[Plan | FactoredPlan] = []
        self._forget()

    def _forget(self) -> None:
        self._planned_for: tuple[Any, Any] | None = None
        self._plans: list[Plan | FactoredPlan] = []
        self._prepared: dict[int, Prepared] = {}
        self._casts: dict[str, torch.dtype | None] = {}
        self._inputs: dict[int, tuple[Any, int, Any]] = {}
        self._depth = 0
        self._with_gradient = False

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}  # what was built belongs to one forward pass of one model

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layers, self._captured = state["layers"], []
        self._join_layers()
        self._forget()

    def _join_layers(self) -> None:
        # Weakly: a graph kept here leads to the layers, and a cycle through autograd's nodes would never be freed.
        for layer in self.layers:
            layer.builder = weakref.ref(self)

    def attach(self, model: nn.Module) -> None:
        """Build at the start of every forward pass of ``model``, for the adapted layers that it has now."""
        self.layers = [layer for layer in model.modules() if isinstance(layer, FloraLayer) and _buildable(layer)]
        self._join_layers()
        self.detach(model)
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end, always_call=True)

    def detach(self, model: nn.Module) -> None:
        """Leave the model alone from now on."""
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]
        self._forget()

    def together(self) -> dict[FloraLayer, int]:
        """With how many layers, itself included, each layer's weight or matrices are built, as the layers stand now."""
        groups = [
            *(stack.layers for stack in stacks(self.layers)),
            *(stack.layers for stack in factored_stacks(self.layers)),
        ]
        return {layer: len(layers) for layers in groups for layer in layers}

    def prepared_for(self, layer: FloraLayer) -> Prepared | None:
        """What the layer runs with in the running forward pass, if anything was built for it."""
        if torch.compiler.is_compiling() or not self._prepared:
            return None
        if self._depth == 0 and torch._C._current_graph_task_id() == -1:
            return None  # called past the model: parameters may have changed since
        if any(_autocast(device) != cast for device, cast in self._casts.items()):
            return None  # switched off or on within the model: the layer computes in another dtype than was built
        if self._with_gradient and not torch.is_grad_enabled():
            # Reentrant gradient checkpointing: the recomputation has a graph of its own and must not share this one.
            self._prepared.pop(id(layer), None)
        return self._prepared.get(id(layer))

    def converted(self, input: Tensor, dtype: torch.dtype) -> Tensor:
        """A layer's input as autocast would convert it to ``dtype``: once for all layers that take the same tensor.

        They then keep one copy of it, and the gradients that they send back add up in that dtype.
        """
        if input.dtype != torch.float32 or self._casts.get(input.device.type) != dtype or input.is_inference():
            return input
        if self._depth == 0 or not torch.is_grad_enabled():
            return input
        source, version, copy = self._inputs.get(id(input), (None, 0, None))
        cast = copy() if source is not None and source() is input and version == input._version else None
        if cast is None:
            cast = input.to(dtype)
            self._inputs[id(input)] = weakref.ref(input), input._version, weakref.ref(cast)  # autograd keeps them
        return cast

    def _begin(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._depth += 1
        if self._depth > 1:
            return
        self._prepared, self._inputs = {}, {}
        if getattr(model, "_is_replica", False) or in_transform():
            return
        signature = [_signature(layer) for layer in self.layers]
        self._casts = {device: _autocast(device) for device in self._casts}
        if (signature, self._casts) != self._planned_for:
            self._plans = plans(self.layers)
            weights = [stored(layer.base_layer, "weight") for layer in self.layers]
            devices = {weight.device.type for weight in weights if isinstance(weight, Tensor)}
            self._casts = {device: _autocast(device) for device in devices}
            self._planned_for = signature, self._casts
        self._with_gradient = torch.is_grad_enabled()
        for plan in self._plans:
            parameters = plan.parameters()
            sharded = any(issubclass(kind, DTensor) for kind in {type(p) for p in parameters})
            alike = len({p.dtype for p in parameters}) == 1
            if alike and not sharded and 0 not in {p.numel() for p in parameters}:
                outputs = plan.build(parameters)
                if capturing(parameters[0]):
                    self._captured.append(plan)  # a replay reads its tables, whatever was planned since
                self._prepared.update(zip((id(layer) for s in plan.stacks for layer in s.layers), outputs, strict=True))

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._depth = max(self._depth - 1, 0)  # 0: a hook that ran before _begin has raised
        if self._depth == 0:
            self._inputs = {}
            if not self._with_gradient:
                self._prepared = {}


def _buildable(layer: FloraLayer) -> bool:
    """Whether the layer's only weight can be built with those of others: W + update, the update made as FLoRA's is."""
    return layer.stackable and type(layer).get_delta_weight is FloraLayer.get_delta_weight


def plans(layers: Sequence[FloraLayer]) -> list[Plan | FactoredPlan]:
    """How the layers' weights are built, as the layers stand now: a plan for each device and each dtype involved."""
    places: dict[Any, list[Any]] = {}
    for stack in stacks(layers):
        layer = stack.layers[0]
        core, weight = layer.core(stack.adapter), layer.base_weight("weight")
        fast = TritonPlan is not None and (core.is_cuda or INTERPRETED) and core.dtype == torch.float32
        fast = fast and core.device == weight.device
        key: tuple[Any, ...] = (TorchPlan, core.device, weight.device, core.dtype)
        if fast and takes(stack):
            key = (TritonPlan, core.device, weight.dtype, stack.dtype)
        places.setdefault(key, []).append(stack)
    for matrices in factored_stacks(layers):
        core = matrices.layers[0].core(matrices.adapter)
        places.setdefault((FactoredPlan, core.device, core.dtype), []).append(matrices)
    return [key[0](members) for key, members in places.items()]


def _autocast(device: str) -> torch.dtype | None:
    casts = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if casts else None


def _signature(layer: FloraLayer) -> tuple[Any, ...]:
    """What ``plans`` depends on besides autocast, cheap enough for every forward pass."""
    own = layer.__dict__  # past nn.Module's attribute lookup
    active = own["_active_adapter"]
    base = own["_modules"]["base_layer"]
    weight = base._parameters.get("weight")
    state = (
        type(base),
        own["revision"],
        own["training"],
        own["_disable_adapters"],
        len(own["merged_adapters"]),
        active if isinstance(active, str) else tuple(active),
        *own["scaling"].values(),
    )
    cores = own["_modules"]["tucker_core"]._modules
    dtypes = [core.dtype for weights in cores.values() for core in weights._parameters.values() if core is not None]
    if weight is None:
        return (*state, *dtypes)
    layout = weight.numel(), weight.stride()
    return (*state, *dtypes, type(weight), weight.dtype, weight.device, weight.requires_grad, *layout)
