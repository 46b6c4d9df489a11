"""What rivals that add to a weight share: a rival is the shapes, the start and the product of its parameters.

The rest (merging, saving, several adapters, DoRA's magnitudes, every layer that reads a weight) is in flora.replaced.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from flora.replaced.config import ReplacedConfig
from flora.replaced.containers import AdapterParameters, at_hand
from flora.replaced.conv import ReplacedConv
from flora.replaced.layer import Form, ReplacedLayer
from flora.replaced.linear import ReplacedLinear
from flora.replaced.model import Layers, ReplacedModel
from flora.replaced.weights import configured

LINEAR = (nn.Linear, Conv1D)
CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Parametrization:
    """The parameters of one update and the weight they make.

    Args:
        shape: of the stored weight, ``[out, in/groups, kernel...]`` or ``[out, in]``.
        rank: of the update.
        groups: of the convolution, 1 for a matrix.

    Raises:
        ValueError: a weight that the method does not know.
    """

    def __init__(self, shape: tuple[int, ...], rank: int, groups: int = 1) -> None:
        self.shape, self.rank, self.groups = shape, rank, groups

    @classmethod
    def highest_rank(cls, shape: tuple[int, ...], groups: int = 1) -> int:
        """The largest useful rank for a weight of this shape: a larger one adds parameters but no expressiveness."""
        return min(shape[0], math.prod(shape[1:]))

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the weight flattened to a matrix, ``[out, in/groups * kernel...]``."""
        return self.shape[0], math.prod(self.shape[1:])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the trained parameters."""
        raise NotImplementedError

    def start(self, parameters: Mapping[str, Tensor]) -> None:
        """Fill the parameters in place, so that the update is zero."""
        raise NotImplementedError

    def update(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The update without its scale, in any shape that reshapes to the stored weight's."""
        left, right = self.thin_matrices(parameters)
        return left @ right

    def thin_matrices(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Two matrices ``[rows, k]`` and ``[k, columns]`` whose product is the update of a matrix."""
        raise NotImplementedError


@dataclass
class RivalConfig(ReplacedConfig):
    """Configuration of a rival.

    Attributes:
        parametrization: of the updates.
    """

    parametrization: ClassVar[type[Parametrization]] = Parametrization

    @override
    def _check_ranks(self) -> None:
        super()._check_ranks()
        if not isinstance(self.r, int):
            raise ValueError(f"r: {self.method.value.lower()} takes one integer, got {self.r}")


class RivalLayer(ReplacedLayer):
    """A layer whose update is made by a ``Parametrization``."""

    adapter_layer_names = ("tucker_factors", *ReplacedLayer.adapter_layer_names)
    other_param_names = (*ReplacedLayer.other_param_names, "parametrizations")
    tucker_factors: Any  # ModuleDict: adapter -> ParameterDict: name -> parameter
    parametrizations: dict[str, Parametrization]

    @override
    def create_containers(self) -> None:
        self.tucker_factors = nn.ModuleDict()
        self.parametrizations = {}

    @override
    def create_parameters(self, adapter_name: str, config: Any, name: str) -> None:
        (weight,) = self.weights[adapter_name].values()
        rank = configured(config.rank_pattern, name, weight)
        rank = config.r if rank is None else rank
        if not isinstance(rank, int):
            raise ValueError(f"rank_pattern: {config.method.value.lower()} takes one integer for {name}, got {rank}")
        groups = getattr(self.get_base_layer(), "groups", 1)
        try:
            parametrization = config.parametrization(weight.weight_shape, rank, groups)
        except ValueError as error:
            raise ValueError(f"target_modules: {name}: {error}") from None
        self.parametrizations[adapter_name] = parametrization
        self.effective_ranks[adapter_name] = {weight.name: (rank,)}
        self.tucker_factors[adapter_name] = AdapterParameters(
            {key: nn.Parameter(torch.empty(shape)) for key, shape in parametrization.shapes().items()}
        )

    @override
    @torch.no_grad()
    def reset_adapter(self, adapter_name: str, config: Any) -> None:
        self.parametrizations[adapter_name].start(self.tucker_factors[adapter_name])

    @override
    def get_delta_weight(self, adapter: str, weight: str | None = None) -> Tensor:
        (described,) = self.weights[adapter].values()
        update = self.parametrizations[adapter].update(at_hand(self.tucker_factors[adapter]))
        return update.reshape(described.weight_shape) * self.scaling[adapter]


class RivalLinear(RivalLayer, ReplacedLinear):
    """A linear layer that passes its input through the two thin matrices of its update."""

    @override
    def thin_matrices(self, adapter: str) -> tuple[Tensor, Tensor]:
        left, right = self.parametrizations[adapter].thin_matrices(at_hand(self.tucker_factors[adapter]))
        return left * self.scaling[adapter], right

    @override
    def cheaper_form(self, adapter_name: str) -> Form:
        return "factored"


class RivalConv(RivalLayer, ReplacedConv):
    """A convolution that runs merged, as in loralib."""


class RivalModel(ReplacedModel):
    """The PEFT tuner of a rival."""

    tuner_layer_cls = RivalLayer
    layer_classes: ClassVar[Layers] = ((LINEAR, RivalLinear), (CONV, RivalConv))
