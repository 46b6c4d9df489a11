"""Weights kept for inference: built once for a layer as it stands, and used until what they are made of changes."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from flora.adapters.layer import FloraLayer
from flora.replaced import bases, stand_in
from flora.replaced.containers import AdapterParameters
from flora.replaced.precision import compute_dtype

# What a layer runs with: merged, its weight, perhaps with its bias; factored, its two thin matrices.
Prepared = dict[str, Tensor] | tuple[Tensor, Tensor]
# The children of a layer by which its adapters take part in what it computes.
_HELD = ("tucker_core", "tucker_factors", "tucker_magnitude", "tucker_dropout")


@dataclass(slots=True)
class Source:
    """A tensor that something was made of, where it lies, and what tells whether its numbers are still the same.

    Attributes:
        owner, key: the dict that holds the tensor, and its key in it.
        tensor: the tensor.
        version: how often it had been changed in place.
        memory: its storage, which stays allocated as long as this is held, so that no later one has its address.
        address: of its first number.
    """

    owner: dict[str, Any]
    key: str
    tensor: Tensor
    version: int
    memory: Any
    address: int

    @classmethod
    def of(cls, owner: dict[str, Any], key: str) -> "Source":
        """The tensor that lies there now."""
        tensor = owner[key]
        return cls(owner, key, tensor, tensor._version, tensor.untyped_storage(), tensor.data_ptr())

    def same(self) -> bool:
        """Whether it lies there yet, unchanged; not for one that inference mode has swapped its contents into."""
        tensor = self.owner.get(self.key)
        if tensor is not self.tensor or tensor.is_inference():
            return False
        return tensor._version == self.version and tensor.data_ptr() == self.address


class Steps:
    """Tells whether an optimizer has made a step: fused ones change parameters without counting a version.

    Attributes:
        last: stands for the last step.
    """

    last = object()

    @classmethod
    def made(cls, *_: object) -> None:
        """Note a step; what torch.compile makes of one counts versions."""
        if not torch.compiler.is_dynamo_compiling():
            cls.last = object()


register_optimizer_step_post_hook(Steps.made)


class _Found(NamedTuple):
    """What a layer runs with, what that was made of, and the last step of an optimizer before."""

    prepared: Prepared
    sources: list[Source]
    step: object


class Kept:
    """What was built for the layers of a model in one block, each in the last few states in which it ran.

    A state is what ``state`` tells: which adapter is active, with which scale. Without gradients alone. A layer for
    which nothing can be kept runs in its own way: a quantised, offloaded, sharded or hooked one, an embedding that runs
    factored, one with dropout on, one whose parameters were made in inference mode (torch counts no changes of those),
    one whose scale is a tensor, and every layer while a CUDA graph is captured, which would read the memory after it is
    gone.

    Args:
        states: how many of a layer.
    """

    def __init__(self, states: int) -> None:
        self.states = states
        self._of: dict[FloraLayer, dict[Any, _Found]] = {}

    def prepared_for(self, layer: FloraLayer) -> Prepared | None:
        """What the layer runs with, built now if need be; None where it runs in its own way."""
        own = layer.__dict__
        if own["_disable_adapters"] or own["merged_adapters"] or captured():
            return None
        mine, key = self._of.setdefault(layer, {}), (*state(layer), torch.is_inference_mode_enabled(), _casts(layer))
        step, found = Steps.last, mine.get(key)
        if found is None or found.step is not step or not all(source.same() for source in found.sources):
            mine.pop(key, None)
            if (found := _built(layer, step)) is None:
                return None
        elif len(mine) > 1:
            mine.pop(key, None)  # to stand last, as the one used last; threads may share a block
        mine[key] = found
        for oldest in list(mine)[: -self.states]:
            mine.pop(oldest, None)
        return found.prepared


def captured() -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def state(layer: FloraLayer) -> tuple[Any, ...]:
    """Which adapter a layer runs with, and how.

    Holds modules rather than their addresses, which others have once they are gone.
    """
    own = layer.__dict__  # past nn.Module's attribute lookup
    active, modules = own["_active_adapter"], own["_modules"]
    base = modules["base_layer"]
    names = (active,) if isinstance(active, str) else tuple(active)
    return (
        base,
        *base._modules.values(),
        *[modules[kind]._modules.get(name) for kind in _HELD for name in names],
        bool(base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__),
        own["revision"],
        own["training"],
        own["_disable_adapters"],
        len(own["merged_adapters"]),
        names,
        *own["scaling"].values(),
    )


def _built(layer: FloraLayer, step: object) -> _Found | None:
    """What the layer runs with as it stands, and what that was made of; None where it runs in its own way."""
    adapters = layer._present(layer.active_adapters)
    places = _places(layer, adapters) if adapters and layer.is_tucker() else None
    if places is None or any(owner[key].is_inference() for owner, key in places):
        return None
    if any(isinstance(layer.scaling[adapter], Tensor) for adapter in adapters):
        return None
    # Before it is built: a change by another thread in between is then a change.
    sources = [Source.of(owner, key) for owner, key in places]
    if layer.form_for(adapters) != "merged":
        if not layer.stackable or layer._hooked() or any(layer.drops(adapter) for adapter in adapters):
            return None
        if layer.configured_form[adapters[0]] == "factored":  # asked for: thin matrices take little memory
            if len(adapters) > 1 or layer.thin_core_side(adapters[0]) is None:
                return None
            dtype = compute_dtype(layer.base_weight("weight"))
            left, right = layer.thin_matrices(adapters[0])  # type: ignore[operator]
            return _Found((left.to(dtype), right.to(dtype)), sources, step)
    names = dict.fromkeys(name for adapter in adapters for name in layer.weights[adapter])
    prepared = {name: layer.adapted_weight(name, adapters) for name in names}
    if layer.stackable:  # its op is known: autocast would convert the weight in every pass
        prepared = {name: weight.to(compute_dtype(weight)) for name, weight in prepared.items()}
    return _Found(prepared, sources, step)


def _places(layer: FloraLayer, adapters: list[str]) -> list[tuple[dict[str, Any], str]] | None:
    """Where the tensors lie that W + delta is made of; None where others than plain ones take part."""
    base: nn.Module = layer.get_base_layer()
    places: list[tuple[dict[str, Any], str]] = []
    if base is not layer.base_layer or layer._weight_is_elsewhere():
        return None
    for name in dict.fromkeys(name for adapter in adapters for name in layer.weights[adapter]):
        owner, attribute = stand_in.place(base, name)
        if not bases.plain(owner, attribute):
            return None
        places.append((owner._parameters, attribute))
    for attribute in layer.adapter_layer_names:
        held = getattr(layer, attribute)
        for adapter in adapters:
            if adapter not in held:
                continue
            container = held[adapter]
            hooked = container._forward_pre_hooks or "forward" in vars(container)
            if hooked or not isinstance(container, AdapterParameters):
                return None  # FSDP or accelerate brings the parameters when they are asked for
            places += [(container._parameters, key) for key in container._parameters]
    whole = all(type(owner[key]) is nn.Parameter and owner[key].numel() > 0 for owner, key in places)
    return places if whole and not any(owner[key].is_meta for owner, key in places) else None


def _casts(layer: FloraLayer) -> torch.dtype | None:
    weight = layer.__dict__["_modules"]["base_layer"]._parameters.get("weight")
    return autocast_to((next(layer.parameters()) if weight is None else weight).device.type)


def autocast_to(device: str) -> torch.dtype | None:
    """What autocast converts to on a device; None where it is off."""
    casts = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if casts else None
