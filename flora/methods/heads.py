"""What belongs to a model's head, and how many parameters a method trains in it and outside it."""

import math
from collections.abc import Sequence

from torch import nn


def in_head(name: str, head: Sequence[str]) -> bool:
    """Whether a parameter or module name, possibly behind PEFT's prefix, belongs to the classifier."""
    name = name.removeprefix("base_model.model.")
    return any(name == h or name.startswith(f"{h}.") for h in head)


def trained(model: nn.Module, head: Sequence[str]) -> tuple[int, int]:
    """Numbers of parameters that a wrapped model trains outside its head and in it."""
    sizes = [(in_head(name, head), p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    return sum(size for inside, size in sizes if not inside), sum(size for inside, size in sizes if inside)


def start(model: nn.Module, head: Sequence[str], classes: int, how: str) -> None:
    """Start the linear layers of a fresh head that have an output for each class: one in each module of the head.

    Args:
        model: with the fresh head, changed in place.
        head: names of its modules.
        classes: outputs of the head.
        how: ``zero``: all classes are equally likely before training. ``linear``: uniform in
            +-1 / sqrt(inputs), as torch starts an ``nn.Linear``, from torch's global seed.

    Raises:
        ValueError: no module of the head ends in such a layer.
    """
    layers = _last_layers(model, head, classes)
    if not layers:
        raise ValueError("the head does not end in a linear layer with an output for each class")
    for layer in layers:
        if how == "linear":
            layer.reset_parameters()
            continue
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


def spread(model: nn.Module, head: Sequence[str], classes: int) -> float:
    """Largest standard deviation of the last weights of a head, in units of 1 / sqrt(inputs); 0 without such a layer.

    Torch starts an ``nn.Linear`` with 0.58.
    """
    layers = _last_layers(model, head, classes)
    return max((float(x.weight.detach().std(correction=0)) * math.sqrt(x.in_features) for x in layers), default=0.0)


def _last_layers(model: nn.Module, head: Sequence[str], classes: int) -> list[nn.Linear]:
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    ends = [[layer for name, layer in linear.items() if in_head(name, [part])][-1:] for part in head]
    return [layer for end in ends for layer in end if layer.out_features == classes]
