"""MoSLoRA: LoRA with a free matrix between its two factors. Convolutions are flattened."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from typing_extensions import override

from flora.methods.rivals.base import Parametrization, RivalConfig, RivalModel
from flora.replaced.config import PeftMethod


class Moslora(Parametrization):
    """B M A with B ``[out, r]``, mixer M ``[r, r]``, A ``[r, columns]``; B starts at zero, M and A as in the paper."""

    @override
    def shapes(self) -> dict[str, tuple[int, ...]]:
        rows, columns = self.matrix
        return {"A": (self.rank, columns), "B": (rows, self.rank), "M": (self.rank, self.rank)}

    @override
    def start(self, parameters: Mapping[str, Tensor]) -> None:
        nn.init.kaiming_uniform_(parameters["A"], a=math.sqrt(5))
        nn.init.kaiming_uniform_(parameters["M"], a=math.sqrt(5))
        nn.init.zeros_(parameters["B"])

    @override
    def thin_matrices(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return parameters["B"], parameters["M"] @ parameters["A"]


@dataclass
class MosloraConfig(RivalConfig):
    """MoSLoRA: mixture of subspaces by a free core (arXiv 2406.11909)."""

    method: ClassVar[PeftMethod] = PeftMethod("MOSLORA")
    parametrization: ClassVar[type[Parametrization]] = Moslora


class MosloraModel(RivalModel):
    """The PEFT tuner of MoSLoRA."""
