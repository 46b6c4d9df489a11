"""BitFit: train the biases of convolutions and linear layers, or all biases, and nothing else (arXiv 2106.10199)."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from flora.methods.base import Adapted, adaptable, normalisations, save_trained
from flora.methods.heads import in_head


class BitFit:
    """Trains the biases that a model has, and its head; changes the base model in place.

    Args:
        name: the method's name in records.
        norms: train the biases of normalisation layers too, as the paper does.
    """

    def __init__(self, name: str, norms: bool = False) -> None:
        self.name, self.norms = name, norms

    def apply(self, model: nn.Module, head: Sequence[str]) -> Adapted:
        """Unfreeze the biases and the head; layers without a bias are listed as skipped.

        Raises:
            ValueError: no convolution or linear layer has a bias, nor, with ``norms``, a normalisation layer.
        """
        layers = [n for n in adaptable(model, head) if not isinstance(model.get_submodule(n), nn.Embedding)]
        biased = {f"{name}.bias" for name in layers if getattr(model.get_submodule(name), "bias", None) is not None}
        norms = normalisations(model, head) if self.norms else []
        of_norms = [name for name in norms if getattr(model.get_submodule(name), "bias", None) is not None]
        trained = biased | {f"{name}.bias" for name in of_norms}
        if not trained:
            hint = "" if self.norms else "; adapter.norms=true trains those of normalisation layers"
            raise ValueError(f"bitfit: no convolution or linear layer of this model has a bias to train{hint}")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained or in_head(name, head))
        return Adapted(model, skipped=[name for name in layers if f"{name}.bias" not in biased])

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write biases and head to ``model.safetensors``."""
        save_trained(model, folder)
