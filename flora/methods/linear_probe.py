"""The head alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from flora.methods.base import Adapted
from flora.methods.budget import refuse
from flora.methods.heads import in_head


class LinearProbe:
    """Train the head on the frozen backbone."""

    def __init__(self, name: str, lr: float, head_lr: float | None, budget: Any = None) -> None:
        refuse(budget, name)
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
        trained = {n: p.detach().contiguous().cpu() for n, p in model.named_parameters() if p.requires_grad}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trained, folder / "model.safetensors", metadata={"format": "pt"})
