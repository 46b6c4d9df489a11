"""TriLoRA: LoRA with a diagonal matrix between its two factors. Convolutions are flattened."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from typing_extensions import override

from flora.methods.rivals.base import Parametrization, RivalConfig, RivalModel
from flora.replaced.config import PeftMethod


class Trilora(Parametrization):
    """B diag(e) A, the compact SVD; e starts at zero, A and B orthonormal."""

    @override
    def shapes(self) -> dict[str, tuple[int, ...]]:
        rows, columns = self.matrix
        return {"A": (self.rank, columns), "B": (rows, self.rank), "E": (self.rank,)}

    @override
    def start(self, parameters: Mapping[str, Tensor]) -> None:
        for name in "AB":
            if not parameters[name].is_meta:
                nn.init.orthogonal_(parameters[name])
        nn.init.zeros_(parameters["E"])

    @override
    def thin_matrices(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return parameters["B"] * parameters["E"], parameters["A"]


@dataclass
class TriloraConfig(RivalConfig):
    """TriLoRA: a diagonal core (arXiv 2405.11236); AdaLoRA without its rank allocation and penalty."""

    method: ClassVar[PeftMethod] = PeftMethod("TRILORA")
    parametrization: ClassVar[type[Parametrization]] = Trilora


class TriloraModel(RivalModel):
    """The PEFT tuner of TriLoRA."""
