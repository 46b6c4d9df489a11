"""The methods that a trial is run with, and what each adds to a weight, written out by hand."""

import re
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import flora

SCALE = 2.0
RANK = 4
_LETTERS = "abcdef"
# Where the adapted model is the root, or lies inside a wrapper of PEFT or of a library.
_FLORA = re.compile(r"(.*?)\.?tucker_(core|factors)\.(\w+)\.(.+)$")
_LORA = re.compile(r"(.*?)\.?lora_(embedding_)?([AB])\.(\w+)(\.weight)?$")


@dataclass(frozen=True)
class Method:
    """A method of PEFT.

    Attributes:
        name: as the table's column.
        form: FLoRA's field ``forward``.
    """

    name: str
    form: str = "auto"

    @property
    def is_flora(self) -> bool:
        """Whether it is FLoRA, in any of its forms."""
        return self.name != "LoRA"

    def config(self, target_modules: Any, *, zero: bool = False, **settings: Any) -> peft.PeftConfig:
        """A configuration, in which an update is not zero at the start unless ``zero``."""
        if self.is_flora:
            own = {"r": RANK, "kernel_rank": 2, "scale": SCALE, "init_weights": zero, "forward": self.form}
            return flora.FloraConfig(target_modules=target_modules, **own | settings)
        own = {"r": RANK, "lora_alpha": SCALE * RANK, "init_lora_weights": zero}
        return peft.LoraConfig(target_modules=target_modules, **own | settings)

    def wrap(self, model: nn.Module, target_modules: Any, **settings: Any) -> Any:
        """The model with an adapter, in place."""
        return peft.get_peft_model(model, self.config(target_modules, **settings))

    def parameters(self, model: nn.Module, adapter: str = "default") -> dict[tuple[str, str], dict[str, nn.Parameter]]:
        """What an adapter trains: by layer and weight, the parts of the update."""
        found: dict[tuple[str, str], dict[str, nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if self.is_flora and (match := _FLORA.match(name)):
                layer, kind, owner, key = match.groups()
                key, _, mode = key.rpartition("_") if kind == "factors" else (key, "", "core")
                place, part = (layer, key), mode
            elif not self.is_flora and (match := _LORA.match(name)):
                layer, _, part, owner, _ = match.groups()
                place = (layer, "weight")
            else:
                continue
            if owner == adapter:
                place = (place[0].removeprefix("base_model.model").lstrip("."), place[1])
                found.setdefault(place, {})[part] = parameter
        return found


FLORA, MERGED, FACTORED, LORA = (
    Method("FLoRA"),
    Method("FLoRA, merged", "merged"),
    Method("FLoRA, factored", "factored"),
    Method("LoRA"),
)
METHODS = (FLORA, MERGED, FACTORED, LORA)


def delta(parts: dict[str, Tensor], base: nn.Module, shape: torch.Size) -> Tensor:
    """The update of one weight, by plain torch: scale * (core x factors), or LoRA's scale * B A."""
    if "core" not in parts:
        product = parts["B"].flatten(1) @ parts["A"].flatten(1)
        transposed = isinstance(base, nn.Embedding | Conv1D)
        return SCALE * (product.mT if transposed else product).reshape(shape)
    ranks = _LETTERS[: parts["core"].dim()]
    terms, operands, output = [ranks], [parts["core"]], ""
    for mode, rank in enumerate(ranks):
        if (factor := parts.get(str(mode))) is None:
            output += rank
            continue
        terms.append(rank.upper() + rank)
        operands.append(factor)
        output += rank.upper()
    return SCALE * torch.einsum(f"{','.join(terms)}->{output}", *operands).reshape(shape)
