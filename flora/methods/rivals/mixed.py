"""LoRA with a matrix between its two factors: any (MoSLoRA) or diagonal (TriLoRA). Convolutions are flattened."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from typing_extensions import override

from flora.adapters.config import PeftMethod
from flora.methods.rivals.form import Form, RivalConfig, RivalModel


class MosloraForm(Form):
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
    def thin(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return parameters["B"], parameters["M"] @ parameters["A"]


class TriloraForm(Form):
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
    def thin(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return parameters["B"] * parameters["E"], parameters["A"]


@dataclass
class MosloraConfig(RivalConfig):
    """MoSLoRA: mixture of subspaces by a free core (arXiv 2406.11909)."""

    method: ClassVar[PeftMethod] = PeftMethod("MOSLORA")
    form: ClassVar[type[Form]] = MosloraForm


@dataclass
class TriloraConfig(RivalConfig):
    """TriLoRA: a diagonal core (arXiv 2405.11236); AdaLoRA without its rank allocation and penalty."""

    method: ClassVar[PeftMethod] = PeftMethod("TRILORA")
    form: ClassVar[type[Form]] = TriloraForm


class MosloraModel(RivalModel):
    """The PEFT tuner of MoSLoRA."""


class TriloraModel(RivalModel):
    """The PEFT tuner of TriLoRA."""
