"""What belongs to a model's head, and how many parameters a method trains in it and outside it."""

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
