"""LoTR: layers of one shape share their outer factors, each has a core of its own (arXiv 2402.01376)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import override

from flora.methods.rivals.base import Parametrization, RivalConfig, RivalModel
from flora.replaced.config import PeftMethod


class Lotr(Parametrization):
    """L M R with L ``[out, r]`` and R ``[r, columns]`` shared, M ``[r, r]`` the layer's; convolutions are flattened.

    M starts at zero, L and R are normal, as in the authors' code.
    """

    @override
    def shapes(self) -> dict[str, tuple[int, ...]]:
        rows, columns = self.matrix
        return {"L": (rows, self.rank), "M": (self.rank, self.rank), "R": (self.rank, columns)}

    @override
    def start(self, parameters: Mapping[str, Tensor]) -> None:
        nn.init.normal_(parameters["L"])
        nn.init.zeros_(parameters["M"])
        nn.init.normal_(parameters["R"])

    @override
    def thin_matrices(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return parameters["L"], parameters["M"] @ parameters["R"]


@dataclass
class LotrConfig(RivalConfig):
    """LoTR over n layers of one shape: r (out + columns) + n r^2 parameters."""

    method: ClassVar[PeftMethod] = PeftMethod("LOTR")
    parametrization: ClassVar[type[Parametrization]] = Lotr
    shares_factors: ClassVar[bool] = True


class LotrModel(RivalModel):
    """The PEFT tuner of LoTR; layers share where the flattened shape and the rank agree."""

    @override
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        shared: dict[tuple[int, ...], nn.ParameterDict] = {}
        for _, layer, _ in self.adapted_weights(adapter_name):
            parameters, own = layer.tucker_factors[adapter_name], layer.parametrizations[adapter_name]
            first = shared.setdefault((*own.matrix, own.rank), parameters)
            parameters["L"], parameters["R"] = first["L"], first["R"]
