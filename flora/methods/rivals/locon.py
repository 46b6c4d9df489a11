"""LyCORIS' LoCon with its Tucker-2 form for convolutions, from the lycoris package (arXiv 2309.14859)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from flora import extras
from flora.errors import ConfigError
from flora.methods.rivals.base import Parametrization, RivalConfig, RivalModel
from flora.replaced.config import PeftMethod


class Locon(Parametrization):
    """up x mid x down with down ``[r, in/groups, 1, 1]``, mid ``[r, r, kernel...]``, up ``[out, r, 1, 1]``.

    Matrices, and kernels of size 1, have no mid. Shapes, start and product are the package's.
    """

    @classmethod
    @override
    def highest_rank(cls, shape: tuple[int, ...], groups: int = 1) -> int:
        return min(shape[:2])

    @override
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._drawn("meta").items()}

    @override
    def start(self, parameters: Mapping[str, Tensor]) -> None:
        for name, tensor in self._drawn("cpu").items():
            if not parameters[name].is_meta:
                parameters[name].copy_(tensor)

    @override
    def update(self, parameters: Mapping[str, Tensor]) -> Tensor:
        return _lycoris().diff_weight(parameters["down"], parameters["up"], parameters.get("mid"), backend="torch")

    @override
    def thin_matrices(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return parameters["up"], parameters["down"]

    def _drawn(self, device: str) -> dict[str, Tensor]:
        spatial = any(size > 1 for size in self.shape[2:])
        with torch.device(device):
            shape = self.shape if spatial else self.matrix
            drawn = _lycoris().weight_gen(torch.empty(shape, device="meta"), self.rank, tucker=spatial)
        return {name: t for name, t in zip(("down", "up", "mid"), drawn, strict=True) if t is not None}


def _lycoris() -> Any:
    try:
        import lycoris.functional.locon  # imports half a second of what only this method needs
    except ModuleNotFoundError as error:
        raise ConfigError(extras.explained("locon_tucker", error) or str(error)) from error
    return lycoris.functional.locon


@dataclass
class LoconConfig(RivalConfig):
    """locon_tucker: r (in/groups + out) + r^2 k^2 parameters for a convolution, r (in + out) for a matrix."""

    method: ClassVar[PeftMethod] = PeftMethod("LOCON_TUCKER")
    parametrization: ClassVar[type[Parametrization]] = Locon


class LoconModel(RivalModel):
    """The PEFT tuner of locon_tucker."""
