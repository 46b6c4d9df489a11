"""LoRA with convolutions flattened as in Microsoft's loralib: the baseline of the FLoRA paper, any number of groups."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn
from typing_extensions import override

from flora.methods.rivals.base import Parametrization, RivalConfig, RivalModel
from flora.replaced.config import PeftMethod


class LoraFlat(Parametrization):
    """B A with A ``[r k, in k]`` and B ``[out/groups k, r k]``, read as ``[out, in/groups, k, k]``.

    A convolution takes r k^2 (in + out/groups) parameters (LoRA, arXiv 2106.09685; grouped form of loralib 0.1.2); a
    linear layer is the case k = 1.
    """

    def __init__(self, shape: tuple[int, ...], rank: int, groups: int = 1) -> None:
        super().__init__(shape, rank, groups)
        kernel = shape[2:]
        if len(shape) not in (2, 4) or len(set(kernel)) > 1:
            raise ValueError(f"flattening is defined for matrices and square 2-D kernels, not for {list(shape)}")
        self.side = kernel[0] if kernel else 1

    @classmethod
    @override
    def highest_rank(cls, shape: tuple[int, ...], groups: int = 1) -> int:
        return min(shape[0] // groups, shape[1] * groups)  # B A is [out/groups k, in k], of inner width r k

    @override
    def shapes(self) -> dict[str, tuple[int, ...]]:
        inner, side = self.rank * self.side, self.side
        return {"A": (inner, self.shape[1] * self.groups * side), "B": (self.shape[0] // self.groups * side, inner)}

    @override
    def start(self, parameters: Mapping[str, Tensor]) -> None:
        nn.init.kaiming_uniform_(parameters["A"], a=math.sqrt(5))
        nn.init.zeros_(parameters["B"])

    @override
    def thin_matrices(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return parameters["B"], parameters["A"]


@dataclass
class LoraFlatConfig(RivalConfig):
    """lora_flat, and with ``use_dora`` dora_flat: one trained magnitude per output (DoRA, arXiv 2402.09353)."""

    method: ClassVar[PeftMethod] = PeftMethod("LORA_FLAT")
    parametrization: ClassVar[type[Parametrization]] = LoraFlat

    use_dora: bool = field(
        default=False,
        metadata={"help": "A trained magnitude per output multiplies the normalised W + update (arXiv 2402.09353)."},
    )


class LoraFlatModel(RivalModel):
    """The PEFT tuner of lora_flat and dora_flat."""
