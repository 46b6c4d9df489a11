"""Weights built for many layers together, once per forward pass of a model, rather than layer by layer.

Layer by layer, an adapter is bound by launching many tiny kernels. Here the cores and factors of all layers of one
shape are stacked, contracted with a leading batch dimension (small modes first), and added to the frozen weights in the
dtype that the layers compute in; each layer then runs once with its W + delta. The backward pass goes the same way.
On a GPU, stacks of all shapes share their launches too. No second copy of the frozen weights outlives the step.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flora.adapters.fast.factored_plan import FactoredPlan, factored_stacks
from flora.adapters.fast.fused import linear_plus_thin
from flora.adapters.fast.kept import Kept, Prepared, Steps, captured
from flora.adapters.fast.kept import autocast_to as _autocast
from flora.adapters.fast.kept import state as _state
from flora.adapters.fast.plan import Plan, capturing, stacks
from flora.adapters.fast.torch_plan import TorchPlan
from flora.adapters.fast.traced import TracedPass
from flora.adapters.layer import FloraLayer
from flora.replaced.containers import AdapterParameters
from flora.replaced.passes import RUNNING, TRACED

try:
    from flora.adapters.fast.triton_kernel import INTERPRETED
    from flora.adapters.fast.triton_plan import TritonPlan, takes
except ImportError:  # Triton comes with torch for CUDA and ROCm only
    TritonPlan, INTERPRETED = None, False  # type: ignore[assignment,misc]


Casts = tuple[torch.dtype | None, ...]  # what autocast converts to, by device


class Batched:
    """A context in which a model's layers share the building of their weights; see ``flora.batched``.

    Keeps how the layers are grouped (plans), which is checked against the layers in every pass. What is built lives in
    a ``Pass`` that ends with the ``with`` block.
    """

    def __init__(self, model: nn.Module, keep: int = 0) -> None:
        every = [layer for layer in model.modules() if isinstance(layer, FloraLayer)]
        self.layers = [layer for layer in every if _buildable(layer)]
        self.members = {id(layer) for layer in self.layers}
        self.states = keep
        self.keeping = {layer for layer in every if keep}
        self.devices: tuple[str, ...] = ()
        self._plans: dict[Casts, tuple[list[Any], list[_Planned]]] = {}
        self._captured: list[Plan | FactoredPlan] = []

    def __enter__(self) -> "Batched":
        if torch.compiler.is_dynamo_compiling():
            TRACED.append(TracedPass(self.layers, TRACED[-1] if TRACED else None))
        else:
            RUNNING.set(Pass(self, RUNNING.get()))
        return self

    def __exit__(self, *raised: object) -> None:
        if torch.compiler.is_dynamo_compiling():
            TRACED.pop()
            return
        entered = RUNNING.get()
        RUNNING.set(None if entered is None else entered.outer)  # None: entered in another thread or task

    def __call__(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """``run`` within the block: what to give torch.compile for a model, whose calls then enter it."""

        def within(*args: Any, **kwargs: Any) -> Any:
            self.__enter__()  # torch.compile before 2.12 takes no ``with`` of an object made outside
            try:
                return run(*args, **kwargs)
            finally:
                self.__exit__()

        return within

    def __getstate__(self) -> dict[str, Any]:
        # Plans hold addresses of this process.
        return {"layers": self.layers, "states": self.states, "keeping": list(self.keeping)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layers, self.members = state["layers"], {id(layer) for layer in state["layers"]}
        self.states, self.keeping = state["states"], set(state["keeping"])
        self.devices, self._plans, self._captured = (), {}, []

    def plans(self, signature: list[Any], casts: Casts) -> "list[_Planned]":
        """How the layers' weights are built, as they stand now."""
        planned_for, made = self._plans.get(casts, (None, []))
        if planned_for != signature:
            made = [_Planned(plan) for plan in plans(self.layers)]
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
        self.kept = Kept(batched.states) if batched.states else None
        self._built: dict[tuple[Any, ...], _Built] = {}
        self._inputs: dict[int, tuple[Any, Any, Any]] = {}

    def prepared_for(self, layer: FloraLayer) -> Prepared | None:
        """What the layer runs with, if anything was built for it as it stands now."""
        if self.kept is not None and not torch.is_grad_enabled() and layer in self.batched.keeping:
            return self.kept.prepared_for(layer)
        if id(layer) not in self.batched.members:
            return None if self.outer is None else self.outer.prepared_for(layer)
        # A layer that leaves autocast or autograd within the model computes otherwise than those before it.
        # A CUDA graph reads what was built while it was captured: anything else may be gone when it is replayed.
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), captured()
        built = self._built.get((*mode, *map(_autocast, self.batched.devices)))
        if built is None or built.spent or built.step is not Steps.last:
            built = _Built(self.batched)
            self._built[*mode, *map(_autocast, self.batched.devices)] = built
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
        source, version, copy = self._inputs.get(id(input), (None, None, None))
        cast = copy() if source is not None and source() is input and version == _version(input) else None
        if cast is None:
            cast = input.to(dtype)
            self._inputs[id(input)] = weakref.ref(input), _version(input), weakref.ref(cast)  # autograd keeps them
        return cast


class _Built:
    """What a pass built for all layers at once, in one mode of autograd and autocast."""

    def __init__(self, batched: Batched) -> None:
        signature = [_signature(layer) for layer in batched.layers]
        batched.devices = tuple(sorted({weight.device.type for _, weight, *_ in signature if weight is not None}))
        self.step = Steps.last  # of an optimizer, before
        self.spent: list[bool] = []  # filled by a backward pass that goes through what was built, and frees its graph
        self._ready: dict[int, tuple[Prepared, Any, list[Any]]] = {}
        self._memory: list[Any] = []  # held without gradients, in blocks that may last: no later tensor has its address
        states = {id(layer): state for layer, (state, *_) in zip(batched.layers, signature, strict=True)}
        for planned in batched.plans([_plannable(*part) for part in signature], tuple(map(_autocast, batched.devices))):
            # Before they are built: a change by another thread in between is then a change.
            sources = [_sources(places) for places in planned.places]
            outputs = planned.build(batched, self.spent)
            if outputs is None:
                continue
            for layer, made_from, prepared in zip(planned.layers, sources, outputs, strict=True):
                if made_from is None:
                    continue
                if not torch.is_grad_enabled():
                    self._memory += [source.untyped_storage() for _, _, source, *_ in made_from]
                self._ready[id(layer)] = prepared, states[id(layer)], made_from

    def prepared_for(self, layer: FloraLayer) -> Prepared | None:
        """What was built for the layer, unless the layer has changed since."""
        ready = self._ready.get(id(layer))
        if ready is None:
            return None
        prepared, state, made_from = ready
        if _state(layer) != state:
            return None
        for owner, key, source, version, address, trained in made_from:  # `_version` written out: every layer asks
            if owner.get(key) is not source or source.is_inference() or source._version != version:
                return None
            if source.data_ptr() != address or source.requires_grad is not trained:
                return None
        return prepared


class _Planned:
    """A plan, its layers, and where the tensors lie that each layer's weight is built from: a dict and a key in it."""

    def __init__(self, plan: Plan | FactoredPlan) -> None:
        self.plan = plan
        self.layers = [layer for stack in plan.stacks for layer in stack.layers]
        self.places = [_places(layer, stack.adapter) for stack in plan.stacks for layer in stack.layers]

    def build(self, batched: Batched, spent: list[bool]) -> Sequence[Prepared] | None:
        """What the layers run with; None where they must build their own."""
        parameters = self.plan.parameters()
        kinds = {(type(parameter), parameter.dtype, parameter.is_inference()) for parameter in parameters}
        if len({dtype for _, dtype, _ in kinds}) > 1 or any(inference for *_, inference in kinds):
            return None
        if any(issubclass(kind, DTensor) for kind, *_ in kinds) or 0 in {p.numel() for p in parameters}:
            return None
        outputs: Sequence[Prepared] = self.plan.build(parameters)
        if capturing(parameters[0]):
            batched.keep(self.plan)
        one = outputs[0]["weight"] if isinstance(outputs[0], dict) else outputs[0][0]
        if one.grad_fn is not None:
            one.grad_fn.register_prehook(lambda gradients: spent.append(True))
        return outputs


def together(model: nn.Module) -> Mapping[FloraLayer, int]:
    """With how many layers of the model, itself included, each layer's weight or matrices are built."""
    layers = Batched(model).layers
    groups = [*(stack.layers for stack in stacks(layers)), *(stack.layers for stack in factored_stacks(layers))]
    return {layer: len(members) for members in groups for layer in members}


def _buildable(layer: FloraLayer) -> bool:
    """Whether the layer's only weight can be built with those of others: W + update, the update made as FLoRA's is."""
    parameters = (*layer.tucker_core.values(), *layer.tucker_factors.values())
    at_hand = all(isinstance(container, AdapterParameters) for container in parameters)  # not wrapped by FSDP
    return at_hand and layer.stackable and layer.is_tucker()


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


def _version(tensor: Tensor) -> tuple[int, int, bool]:
    """What tells apart a tensor's numbers, where they lie (``tensor.data = ...``), and whether it is trained."""
    return tensor._version, tensor.data_ptr(), tensor.requires_grad


def _sources(places: list[tuple[dict[str, Any], str]]) -> list[Any] | None:
    """The tensors that lie there now; None where some were made in inference mode, which counts no changes of them."""
    if any(owner[key].is_inference() for owner, key in places):
        return None
    return [(owner, key, owner[key], *_version(owner[key])) for owner, key in places]


def _places(layer: FloraLayer, adapter: str) -> list[tuple[dict[str, Any], str]]:
    own = layer.__dict__["_modules"]
    holders = own["tucker_core"]._modules[adapter], own["tucker_factors"]._modules[adapter], own["base_layer"]
    kept = [owner._parameters for owner in holders]
    return [(parameters, key) for parameters in kept for key, value in parameters.items() if value is not None]


def _signature(layer: FloraLayer) -> tuple[Any, ...]:
    """The layer's state, its base weight and the dtypes of its cores; cheap enough for every forward pass."""
    own = layer.__dict__["_modules"]
    cores = own["tucker_core"]._modules.values()
    dtypes = [core.dtype for weights in cores for core in weights._parameters.values() if core is not None]
    return _state(layer), own["base_layer"]._parameters.get("weight"), *dtypes


def _plannable(state: Any, weight: Tensor | None, *dtypes: torch.dtype) -> tuple[Any, ...]:
    """What ``plans`` depends on besides autocast, without the weight's values."""
    if weight is None:
        return state, *dtypes
    return (
        *(state, *dtypes, type(weight), weight.dtype, weight.device, weight.requires_grad),
        *(weight.numel(), weight.stride()),
    )
