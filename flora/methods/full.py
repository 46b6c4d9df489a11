"""Full fine-tuning: everything."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from flora.methods.base import Adapted


class Full:
    """Trains every parameter; normalisation statistics move as well.

    Args:
        name: the method's name in records.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def apply(self, model: nn.Module, head: Sequence[str]) -> Adapted:
        """Unfreeze everything."""
        return Adapted(model.requires_grad_(True))

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the whole state, buffers included, to ``model.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        # Copies, since tied weights share their memory, which safetensors refuses.
        state = {
            n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in model.state_dict().items()
        }
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
