"""The head alone."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from flora.methods.base import Adapted, save_trained
from flora.methods.heads import in_head


class LinearProbe:
    """Trains the head on the frozen backbone.

    Args:
        name: the method's name in records.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def apply(self, model: nn.Module, head: Sequence[str]) -> Adapted:
        """Freeze everything but the head; ValueError where the model has none."""
        if not any(in_head(name, head) for name, _ in model.named_parameters()):
            raise ValueError("linear_probe: this model has no head to train")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(in_head(name, head))
        return Adapted(model)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the head to ``model.safetensors``."""
        save_trained(model, folder)
