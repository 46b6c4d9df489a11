"""flora_nocore: FLoRA without its core.

It spends what FLoRA of the configured ``r`` and ``kernel_rank`` would; the ranks are written to ``rank_pattern``.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn
from typing_extensions import override

from flora.adapters.tucker import ClipRanks
from flora.methods.rivals.base import Parametrization, RivalConfig, RivalModel
from flora.methods.rivals.matched_ranks import MatchedRanks
from flora.replaced.config import PeftMethod, check_choice, check_rank


class Cp(Parametrization):
    """The sum over r of the outer products of one column per mode: CP, a core that is the identity.

    The factor of the outputs starts at zero, the others with orthonormal columns.
    """

    @classmethod
    @override
    def highest_rank(cls, shape: tuple[int, ...], groups: int = 1) -> int:
        return math.prod(shape) // max(shape)

    @override
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {str(mode): (size, self.rank) for mode, size in enumerate(self.shape) if size > 1 or mode == 0}

    @override
    def start(self, parameters: Mapping[str, Tensor]) -> None:
        for mode, factor in parameters.items():
            if mode == "0":
                nn.init.zeros_(factor)
            elif not factor.is_meta:
                nn.init.orthogonal_(factor)

    @override
    def update(self, parameters: Mapping[str, Tensor]) -> Tensor:
        rest = parameters["0"].new_ones(1, self.rank)
        for mode in sorted(int(m) for m in parameters if m != "0"):  # columns of all modes but the first, in order
            rest = (rest[:, None] * parameters[str(mode)]).flatten(0, 1)
        return parameters["0"] @ rest.T

    @override
    def thin_matrices(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        columns = parameters["1"] if "1" in parameters else parameters["0"].new_ones(1, self.rank)
        return parameters["0"], columns.T


@dataclass
class FloraNocoreConfig(RivalConfig):
    """flora_nocore: CP instead of Tucker, one rank for all modes of a layer (a matrix: LoRA)."""

    method: ClassVar[PeftMethod] = PeftMethod("FLORA_NOCORE")
    parametrization: ClassVar[type[Parametrization]] = Cp

    kernel_rank: int | list[int] = field(
        default=2, metadata={"help": "Rank of the kernel modes of the FLoRA whose parameters are matched."}
    )
    clip_ranks: ClipRanks = field(default="multilinear", metadata={"help": "How that FLoRA clips its ranks."})
    use_dora: bool = field(
        default=False,
        metadata={"help": "A trained magnitude per output multiplies the normalised W + update (arXiv 2402.09353)."},
    )

    @override
    def _check_ranks(self) -> None:
        super()._check_ranks()
        check_rank("kernel_rank", self.kernel_rank)

    @override
    def _check_choices(self) -> None:
        super()._check_choices()
        check_choice("clip_ranks", self.clip_ranks, ("multilinear", "mode", "none"))


class FloraNocoreModel(MatchedRanks, RivalModel):
    """The PEFT tuner of flora_nocore."""

    @staticmethod
    @override
    def cost(shape: tuple[int, ...]) -> tuple[Callable[[int], int], int]:
        total = sum(size for mode, size in enumerate(shape) if size > 1 or mode == 0)
        return lambda r: r * total, Cp.highest_rank(shape)
