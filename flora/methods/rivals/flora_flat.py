"""flora_flat: FLoRA without its modes.

It spends what FLoRA of the configured ``r`` and ``kernel_rank`` would; the ranks are written to ``rank_pattern``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from typing_extensions import override

from flora.adapters.config import FloraConfig
from flora.adapters.conv import ConvNd
from flora.adapters.linear import Linear
from flora.adapters.model import FloraModel
from flora.adapters.tucker import parameter_count
from flora.methods.rivals.base import CONV, LINEAR
from flora.methods.rivals.matched_ranks import MatchedRanks
from flora.replaced.config import PeftMethod
from flora.replaced.model import Layers, ReplacedModel
from flora.replaced.weights import AdaptedWeight


@dataclass
class FloraFlatConfig(FloraConfig):
    """flora_flat: FLoRA of the matrix ``[out, in/groups * kernel...]``, so the kernel's modes are lost."""

    method: ClassVar[PeftMethod] = PeftMethod("FLORA_FLAT")


class FlatConv(ConvNd):
    """A convolution whose weight has two modes, outputs and everything else."""

    @override
    def describe_weights(self, config: FloraConfig, name: str) -> list[AdaptedWeight]:
        (plain,) = super().describe_weights(config, name)
        rows, *rest = plain.shape
        return [replace(plain, shape=(rows, math.prod(rest)), kinds=("channel", "channel"))]


class FloraFlatModel(MatchedRanks, FloraModel):
    """The PEFT tuner of flora_flat."""

    layer_classes: ClassVar[Layers] = ((LINEAR, Linear), (CONV, FlatConv))
    add_weighted_adapter = ReplacedModel.add_weighted_adapter  # which refuses

    @staticmethod
    @override
    def cost(shape: tuple[int, ...]) -> tuple[Callable[[int], int], int]:
        flat = (shape[0], math.prod(shape[1:]))
        return lambda r: parameter_count(flat, (r, r)), min(flat)
