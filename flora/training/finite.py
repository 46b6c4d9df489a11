"""Whether what is saved and recorded is made of finite numbers."""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from flora.errors import TrainingDiverged
from flora.launch import processes
from flora.training.sharding import local

_PREFIX = "base_model.model."


def masks(model: nn.Module) -> set[str]:
    """Names, without PEFT's prefix, of buffers that hold infinities or NaN before anything is trained, by design."""
    return {name.removeprefix(_PREFIX) for name in _not_finite(dict(model.named_buffers()))}


def check_weights(model: nn.Module, known: Collection[str], what: str) -> None:
    """TrainingDiverged where a trained parameter or a buffer is not finite; all processes must ask.

    Args:
        model: whose weights; in shards or whole.
        known: buffers that may hold anything, as ``masks`` found them.
        what: the message, which ``{}`` in it gives the name to.
    """
    tensors: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name.removeprefix(_PREFIX) not in known}
    wrong = _not_finite(tensors)
    if processes.anywhere(bool(wrong))[0]:
        raise TrainingDiverged(what.format(wrong[0] if wrong else "a weight of another process"))


def check_metrics(metrics: Mapping[str, float], of: str) -> None:
    """TrainingDiverged where a metric or the loss of a test is not finite."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise TrainingDiverged(
                f"the {name} on {of} was {value}: the network gives no finite numbers there; check its weights and "
                "the data, or train again with a lower trainer.lr"
            )


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of floating tensors that are not all finite; the device is asked once."""
    floats = {n: local(t.detach()) for n, t in tensors.items() if t.is_floating_point() and not t.is_meta}
    flags = [torch.isfinite(tensor).all() for tensor in floats.values()]
    finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []
    return [name for name, sound in zip(floats, finite, strict=True) if not sound]
