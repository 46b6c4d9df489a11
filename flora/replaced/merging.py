"""Puts updates into the base weights of a layer, and takes them out again."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from flora.replaced import magnitude, stand_in, tied


@torch.no_grad()
def merge(layer: Any, adapter: str, safe: bool) -> None:
    """Add the update of an adapter to the base weights of a ``ReplacedLayer``.

    Raises:
        ValueError: if a weight cannot hold the sum, or ``safe`` and a sum is not finite; no weight is changed then.
    """
    merged, ratios = {}, {}
    for name in layer.weights[adapter]:
        check_mergeable(layer, name)
        base = layer.base_weight(name)
        weight = layer.add_delta(base, adapter, name)
        if adapter in layer.tucker_magnitude:
            ratios[name] = magnitude.ratio(layer, adapter, name, weight)
            weight = weight * ratios[name]
        merged[name] = weight.to(base.dtype)
        if safe and not torch.isfinite(merged[name]).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
    _store(layer, merged, untie=True)
    layer.merged_norm_ratio[adapter] = ratios


@torch.no_grad()
def unmerge(layer: Any, adapter: str) -> None:
    """Take the update of a merged adapter out of the base weights."""
    ratios, weights = layer.merged_norm_ratio.pop(adapter, {}), {}
    for name in layer.weights.get(adapter, {}):
        base = layer.base_weight(name)
        weight = base / ratios[name] if name in ratios else base
        weights[name] = (weight - layer.get_delta_weight(adapter, name)).to(base.dtype)
    _store(layer, weights)


@torch.no_grad()
def check_mergeable(layer: Any, name: str) -> None:
    """Raise ValueError if the base weight of that name cannot be added to."""
    full_name = layer.full_name(name)
    if (kind := layer.quantised_as(name)) is not None:
        raise ValueError(
            f"{full_name}: a quantised weight ({kind}) cannot be merged into; reload the model in full precision, "
            "load the adapter onto it and merge there"
        )
    if stand_in.set_by_hook(layer.get_base_layer(), name):
        raise ValueError(
            f"{full_name}: is computed anew by a hook (prune, weight_norm), which would undo the merging; make it a "
            "parameter first (torch.nn.utils.prune.remove, remove_weight_norm)"
        )
    for owner, attribute in _parametrised(layer, [name]).values():
        if stand_in.offloading(owner.parametrizations[attribute]):
            raise ValueError(
                f"{full_name}: a parametrised weight cannot be merged into while it is offloaded; load the model "
                "whole, load the adapter onto it and merge there"
            )
    weight = layer.base_weight(name)
    if math.prod(weight.shape) == 0:
        raise ValueError(f"{full_name}: a partitioned weight cannot be merged into; gather the model first")
    if isinstance(weight, DTensor):
        raise ValueError(f"{full_name}: a sharded weight (DTensor) cannot be merged into; gather the model first")


@torch.no_grad()
def rehearse(layer: Any, adapters: list[str]) -> None:
    """Raise ValueError if ``merge`` would, of all these adapters in turn; changes nothing."""
    names = dict.fromkeys(name for adapter in adapters for name in layer.weights[adapter])
    for name in names:
        check_mergeable(layer, name)
    parametrised = _parametrised(layer, names)
    if not parametrised:
        return
    states, values = _states(parametrised), {name: layer.base_weight(name).detach() for name in names}
    try:
        for adapter in adapters:
            merge(layer, adapter, safe=False)
    finally:
        for adapter in adapters:
            layer.merged_norm_ratio.pop(adapter, None)
        _restore(parametrised, states)
        for name in names.keys() - parametrised.keys():
            stand_in.store(layer.get_base_layer(), name, values[name])
        if not layer.merged_adapters:
            tied.tie_again(layer)


def _store(layer: Any, weights: dict[str, Tensor], untie: bool = False) -> None:
    """Put new numbers into the base weights: all or, if a parametrization cannot hold its own, none.

    ``untie`` first gives the layer parameters of its own in place of those that it shares with other modules.
    """
    parametrised = _parametrised(layer, weights)
    states = _states(parametrised)
    for name, (owner, attribute) in parametrised.items():
        try:
            setattr(owner, attribute, weights[name])  # through the parametrization's inverse
            held = _close(getattr(owner, attribute), weights[name])
        except (NotImplementedError, RuntimeError, ValueError):
            held = False  # it has no inverse, or not of this
        if not held:
            _restore(parametrised, states)
            kinds = ", ".join(type(module).__name__ for module in owner.parametrizations[attribute])
            raise ValueError(
                f"{layer.full_name(name)}: its parametrization ({kinds.lstrip('_')}) cannot hold W + update, so the "
                "adapter cannot be merged; before wrapping, call "
                f'torch.nn.utils.parametrize.remove_parametrizations(layer, "{attribute}")'
            )
    for name in weights.keys() - parametrised.keys():
        if untie:
            tied.untie(layer, name)
        stand_in.store(layer.get_base_layer(), name, weights[name])


def _parametrised(layer: Any, names: Iterable[str]) -> dict[str, tuple[Any, str]]:
    """Those of the weights that are parametrised, with their owner and their name in it."""
    places = {name: stand_in.place(layer.get_base_layer(), name) for name in names}
    return {name: place for name, place in places.items() if parametrize.is_parametrized(*place)}


def _states(places: dict[str, tuple[Any, str]]) -> list[dict[str, Tensor]]:
    lists: list[nn.Module] = [owner.parametrizations[attribute] for owner, attribute in places.values()]
    return [{key: value.clone() for key, value in kept.state_dict().items()} for kept in lists]


def _restore(places: dict[str, tuple[Any, str]], states: list[dict[str, Tensor]]) -> None:
    for (owner, attribute), state in zip(places.values(), states, strict=True):
        owner.parametrizations[attribute].load_state_dict(state)


def _close(actual: Tensor, expected: Tensor) -> bool:
    """Whether two weights agree up to the rounding of a few operations."""
    if actual.is_meta:
        return True
    tolerance = 16 * torch.finfo(expected.dtype).eps * expected.abs().max()
    return actual.shape == expected.shape and bool((actual - expected).abs().max() <= tolerance)
