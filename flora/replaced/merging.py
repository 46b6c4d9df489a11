"""Puts updates into the base weights of a layer, and takes them out again."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from flora.replaced import tied


@torch.no_grad()
def merge(layer: Any, adapter: str, safe: bool) -> None:
    """Add the update of an adapter to the base weights of a ``ReplacedLayer``.

    Raises:
        ValueError: if a weight cannot hold the sum, or ``safe`` and a sum is not finite; no weight is changed then.
    """
    merged, ratios = {}, {}
    for name in layer.weights[adapter]:
        base = layer.base_weight(name)
        _check_mergeable(base, name)
        weight = layer.add_delta(base, adapter, name)
        if adapter in layer.tucker_magnitude:
            ratios[name] = layer.norm_ratio(adapter, name, weight)
            weight = weight * ratios[name]
        merged[name] = weight.to(base.dtype)
        if safe and not torch.isfinite(merged[name]).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
    for name, weight in merged.items():
        tied.untie(layer, name)
        _set_base_weight(layer, name, weight)
    layer.merged_norm_ratio[adapter] = ratios


@torch.no_grad()
def unmerge(layer: Any, adapter: str) -> None:
    """Take the update of a merged adapter out of the base weights."""
    ratios = layer.merged_norm_ratio.pop(adapter, {})
    for name in layer.weights.get(adapter, {}):
        base = layer.base_weight(name)
        weight = base / ratios[name] if name in ratios else base
        _set_base_weight(layer, name, (weight - layer.get_delta_weight(adapter, name)).to(base.dtype))


def _set_base_weight(layer: Any, name: str, value: Tensor) -> None:
    owner_name, _, attribute = name.rpartition(".")
    owner = layer.get_base_layer().get_submodule(owner_name)
    if not parametrize.is_parametrized(owner, attribute):
        getattr(owner, attribute).data = value
        return
    try:
        setattr(owner, attribute, value)  # through the parametrization's inverse, e.g. weight_norm's
    except NotImplementedError:
        raise ValueError(f"{name}: its parametrization has no inverse; the adapter cannot be merged") from None


def _check_mergeable(weight: Tensor, name: str) -> None:
    if not weight.is_floating_point() or math.prod(weight.shape) == 0:
        raise ValueError(
            f"{name}: a quantised or partitioned weight ({weight.dtype}) cannot be merged into; merge into a full one"
        )
    if isinstance(weight, DTensor):
        raise ValueError(f"{name}: a sharded weight (DTensor) cannot be merged into; gather the model first")
