"""Magnitudes (DoRA, arXiv 2402.09353): a trained size per output times the direction of W + update."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flora.replaced.containers import AdapterParameters, at_hand
from flora.replaced.weights import AdaptedWeight


@torch.no_grad()
def create(layer: Any, adapter: str) -> None:
    """Give an adapter of a ``ReplacedLayer`` its magnitudes: the norms of the outputs of each base weight."""
    magnitudes = AdapterParameters()
    for described in layer.weights[adapter].values():
        if (kind := layer.quantised_as(described.name)) is not None:
            raise ValueError(f"use_dora: needs a floating-point weight, {layer.full_name(described.name)} is {kind}")
        base = layer.base_weight(described.name)
        if isinstance(base, DTensor):
            raise ValueError(
                f"use_dora: needs a weight that is here as a whole, {layer.full_name(described.name)} is not"
            )
        magnitudes[described.key] = nn.Parameter(_output_norm(base, described).flatten().to(base.dtype))
    layer.tucker_magnitude[adapter] = magnitudes


def ratio(layer: Any, adapter: str, name: str, weight: Tensor) -> Tensor:
    """Magnitude over norm per output of W + delta: what the sum is multiplied with."""
    # DoRA treats the norm as a constant in the gradient (section 4.3).
    described = layer.weights[adapter][name]
    magnitude = at_hand(layer.tucker_magnitude[adapter])[described.key]
    norm = _output_norm(weight, described).detach()
    return magnitude.view(norm.shape) / torch.where(norm == 0, torch.ones_like(norm), norm)


def _output_norm(weight: Tensor, described: AdaptedWeight) -> Tensor:
    """Euclidean norm per output, with size 1 in place of the other dimensions of the stored weight."""
    dims = [dim for dim in range(weight.dim()) if dim != described.output_dim]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=dims, keepdim=True, dtype=dtype)
