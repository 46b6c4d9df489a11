"""BitFit: train the biases of convolutions and linear layers and nothing else (arXiv 2106.10199)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from flora.methods.base import Adapted, adaptable
from flora.methods.budget import refuse
from flora.methods.heads import in_head
from flora.methods.linear_probe import LinearProbe


class BitFit:
    """Trains the biases that a model has, and its head; changes the base model in place.

    Args:
        name: the method's name in records.
        lr, head_lr: default peak learning rates, read by the trainer's config.
        budget: refused, since its size is fixed.
    """

    head_only = False

    def __init__(self, name: str, lr: float, head_lr: float, budget: Any = None) -> None:
        refuse(budget, name)
        self.name = name

    def apply(self, model: nn.Module, head: Sequence[str]) -> Adapted:
        """Unfreeze the biases and the head; layers without a bias are listed as skipped.

        Raises:
            ValueError: no convolution or linear layer has a bias.
        """
        layers = [n for n in adaptable(model, head) if not isinstance(model.get_submodule(n), nn.Embedding)]
        biased = {f"{name}.bias" for name in layers if getattr(model.get_submodule(name), "bias", None) is not None}
        if not biased:
            raise ValueError("bitfit: no convolution or linear layer of this model has a bias to train")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in biased or in_head(name, head))
        return Adapted(model, skipped=[name for name in layers if f"{name}.bias" not in biased])

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write biases and head to ``model.safetensors``."""
        LinearProbe.save(self, model, folder)  # type: ignore[arg-type]
