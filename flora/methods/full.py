"""Everything."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from flora.methods.base import Adapted
from flora.methods.budget import refuse


class Full:
    """Train every parameter; normalisation statistics move as well."""

    def __init__(self, name: str, lr: float, head_lr: float | None, budget: Any = None) -> None:
        refuse(budget, name)
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
