"""Weights built for many layers together, once per forward pass of a model, rather than layer by layer.

Layer by layer, an adapter is bound by launching many tiny kernels. Here the cores and factors of all layers of one
shape are stacked, contracted with a leading batch dimension (small modes first), and added to the frozen weights in the
dtype that the layers compute in; each layer then runs once with its W + delta. The backward pass goes the same way.
On a GPU, stacks of all shapes share their launches too. No second copy of the frozen weights outlives the step.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flora.adapters.fast.factored_plan import FactoredPlan, factored_stacks
from flora.adapters.fast.fused import linear_plus_thin
from flora.adapters.fast.plan import Plan, capturing, stacks
from flora.adapters.fast.torch_plan import TorchPlan
from flora.adapters.layer import FloraLayer
from flora.replaced.passes import RUNNING

try:
    from flora.adapters.fast.triton_kernel import INTERPRETED
    from flora.adapters.fast.triton_plan import TritonPlan, takes
except ImportError:  # Triton comes with torch for CUDA and ROCm only
    TritonPlan, INTERPRETED = None, False  # type: ignore[assignment,misc]


# What a layer runs with: merged, its weight, perhaps with its bias; factored, its two thin matrices.
Prepared = dict[str, Tensor] | tuple[Tensor, Tensor]
Casts = tuple[torch.dtype | None, ...]  # what autocast converts to, by device


class Batched:
    """A context in which a model's layers share the building of their weights; see ``flora.batched``.

    Keeps how the layers are grouped (plans), which is checked against the layers in every pass. What is built lives in
    a ``Pass`` that ends with the ``with`` block.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [layer for layer in model.modules() if isinstance(layer, FloraLayer) and _buildable(layer)]
        self.members = {id(layer) for layer in self.layers}
        self.devices: tuple[str, ...] = ()
        self._plans: dict[Casts, tuple[list[Any], list[Plan | FactoredPlan]]] = {}
        self._captured: list[Plan | FactoredPlan] = []

    def __enter__(self) -> "Batched":
        if not torch.compiler.is_compiling():
            RUNNING.set(Pass(self, RUNNING.get()))
        return self

    def __exit__(self, *raised: object) -> None:
        if not torch.compiler.is_compiling():
            RUNNING.set(RUNNING.get().outer)

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}  # plans hold addresses of this process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layers, self.members = state["layers"], {id(layer) for layer in state["layers"]}
        self.devices, self._plans, self._captured = (), {}, []

    def plans(self, signature: list[Any], casts: Casts) -> list[Plan | FactoredPlan]:
        """How the layers' weights are built, as they stand now."""
        planned_for, made = self._plans.get(casts, (None, []))
        if planned_for != signature:
            made = plans(self.layers)
            self._plans[casts] = signature, made
        return made

    def keep(self, plan: Plan | FactoredPlan) -> None:
        """Keep a plan for good: a captured CUDA graph reads its tables, whatever is planned later."""
        self._captured.append(plan)


class Pass:
    """What was built in one forward pass, or in several with the same weights.

    Layers that are left out build their own: those with several active adapters or a magnitude, dense ones, factored
    convolutions, folded ones that run factored, and all layers where weights are sharded or offloaded (FSDP, DeepSpeed,
    accelerate) or where cores and factors differ in dtype. So does a layer whose weights, adapters or scale have
    changed since, and every layer where ``flora.replaced.passes.running`` says so.
    """

    def __init__(self, batched: Batched, outer: "Pass | None") -> None:
        self.batched = batched
        self.outer = outer
        self._built: dict[tuple[Any, ...], _Built] = {}
        self._inputs: dict[int, tuple[Any, int, Any]] = {}

    def prepared_for(self, layer: FloraLayer) -> Prepared | None:
        """What the layer runs with, if anything was built for it as it stands now."""
        if id(layer) not in self.batched.members:
            return None if self.outer is None else self.outer.prepared_for(layer)
        # A layer that leaves autocast or autograd within the model computes otherwise than those before it.
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        built = self._built.get((*mode, self._casts()))
        if built is None or built.spent:
            built = _Built(self.batched)
            self._built[*mode, self._casts()] = built
        return built.prepared_for(layer)

    def linear_plus_thin(
        self, base: nn.Linear, input: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """A linear layer and the update ``left @ right`` of its weight in one op, in ``dtype``."""
        return linear_plus_thin(base, input, left, right, dtype)

    def converted(self, input: Tensor, dtype: torch.dtype) -> Tensor:
        """A layer's input as autocast would convert it to ``dtype``: once for all layers that take the same tensor.

        They then keep one copy of it, and the gradients that they send back add up in that dtype.
        """
        if input.dtype != torch.float32 or _autocast(input.device.type) != dtype or input.is_inference():
            return input
        if not torch.is_grad_enabled():
            return input
        source, version, copy = self._inputs.get(id(input), (None, 0, None))
        cast = copy() if source is not None and source() is input and version == input._version else None
        if cast is None:
            cast = input.to(dtype)
            self._inputs[id(input)] = weakref.ref(input), input._version, weakref.ref(cast)  # autograd keeps them
        return cast

    def _casts(self) -> Casts:
        return tuple([_autocast(device) for device in self.batched.devices])


class _Built:
    """What a pass built for all layers at once, in one mode of autograd and autocast."""

    def __init__(self, batched: Batched) -> None:
        batched.devices = tuple(sorted({layer.base_weight("weight").device.type for layer in batched.layers}))
        signature = [(_state(layer), *_layout(layer)) for layer in batched.layers]
        casts = tuple([_autocast(device) for device in batched.devices])
        states = {id(layer): state for layer, (state, *_) in zip(batched.layers, signature, strict=True)}
        self._ready: dict[int, tuple[Prepared, Any, list[int], list[int]]] = {}
        self._held: list[Any] = []  # so that no other tensor takes the place in memory of one that was built from
        self._spent: list[bool] = []
        for plan in batched.plans(signature, casts):
            parameters = plan.parameters()
            sharded = any(issubclass(kind, DTensor) for kind in {type(p) for p in parameters})
            if sharded or len({p.dtype for p in parameters}) > 1 or 0 in {p.numel() for p in parameters}:
                continue
            layers = [layer for stack in plan.stacks for layer in stack.layers]
            outputs: Sequence[Prepared] = plan.build(parameters)
            if capturing(parameters[0]):
                batched.keep(plan)
            self._watch(outputs[0])
            for layer, prepared in zip(layers, outputs, strict=True):
                sources = _sources(layer)
                self._held.append(sources)
                if not any(source.is_inference() for source in sources):  # they count no changes
                    versions = [source._version for source in sources]
                    self._ready[id(layer)] = prepared, states[id(layer)], list(map(id, sources)), versions

    @property
    def spent(self) -> bool:
        """Whether a backward pass has gone through what was built, and freed its graph."""
        return bool(self._spent)

    def prepared_for(self, layer: FloraLayer) -> Prepared | None:
        """What was built for the layer, unless the layer has changed since."""
        prepared, state, identities, versions = self._ready.get(id(layer), (None, None, None, None))
        if prepared is None or _state(layer) != state:
            return None
        sources = _sources(layer)
        same = list(map(id, sources)) == identities and [source._version for source in sources] == versions
        return prepared if same else None

    def _watch(self, output: Prepared) -> None:
        tensor = output["weight"] if isinstance(output, dict) else output[0]
        if tensor.grad_fn is not None:
            spent = self._spent
            tensor.grad_fn.register_prehook(lambda gradients: spent.append(True))


def together(model: nn.Module) -> Mapping[FloraLayer, int]:
    """With how many layers of the model, itself included, each layer's weight or matrices are built."""
    layers = Batched(model).layers
    groups = [*(stack.layers for stack in stacks(layers)), *(stack.layers for stack in factored_stacks(layers))]
    return {layer: len(members) for members in groups for layer in members}


def _buildable(layer: FloraLayer) -> bool:
    """Whether the layer's only weight can be built with those of others: W + update, the update made as FLoRA's is."""
    return layer.stackable and layer.is_tucker()


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


def _state(layer: FloraLayer) -> tuple[Any, ...]:
    """Which adapter a layer runs with, and how."""
    own = layer.__dict__  # past nn.Module's attribute lookup
    active = own["_active_adapter"]
    return (
        own["revision"],
        own["training"],
        own["_disable_adapters"],
        len(own["merged_adapters"]),
        active if isinstance(active, str) else tuple(active),
        *own["scaling"].values(),
    )


def _sources(layer: FloraLayer) -> list[Tensor]:
    """The tensors that a layer's weight is built from: cores and factors of its adapters, weight and bias."""
    own = layer.__dict__["_modules"]
    holders = [*own["tucker_core"]._modules.values(), *own["tucker_factors"]._modules.values(), own["base_layer"]]
    return [tensor for holder in holders for tensor in holder._parameters.values() if tensor is not None]


def _layout(layer: FloraLayer) -> tuple[Any, ...]:
    """What ``plans`` depends on besides the layer's state and autocast, cheap enough for every forward pass."""
    own = layer.__dict__["_modules"]
    weight = own["base_layer"]._parameters.get("weight")
    cores = own["tucker_core"]._modules.values()
    dtypes = [core.dtype for weights in cores for core in weights._parameters.values() if core is not None]
    if weight is None:
        return tuple(dtypes)
    return (*dtypes, type(weight), weight.dtype, weight.device, weight.requires_grad, weight.numel(), weight.stride())
