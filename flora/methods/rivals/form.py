"""What rivals that add to a weight share: a rival is the shapes, the start and the product of its parameters.

The rest (merging, saving, several adapters, DoRA's magnitudes, every layer that reads a weight) is FLoRA's own layer.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from flora.adapters.config import FloraConfig, PeftMethod
from flora.adapters.conv import ConvNd
from flora.adapters.layer import FloraLayer
from flora.adapters.linear import Linear
from flora.adapters.model import FloraModel
from flora.adapters.weights import configured, scaling_of

Layers = tuple[tuple[tuple[type[nn.Module], ...], type[FloraLayer]], ...]
LINEAR = (nn.Linear, Conv1D)
CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Form:
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
        """The largest rank that makes an update of a weight of this shape more expressive."""
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
        left, right = self.thin(parameters)
        return left @ right

    def thin(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Two matrices ``[rows, k]`` and ``[k, columns]`` whose product is the update of a matrix."""
        raise NotImplementedError


@dataclass
class RivalConfig(FloraConfig):
    """Configuration of a rival: of FLoRA's fields ``r``, the scale, DoRA, patterns and targets; others are refused."""

    method: ClassVar[PeftMethod]
    form: ClassVar[type[Form]] = Form
    shares_factors: ClassVar[bool] = False  # between layers, so that no layer's rank can be set by itself
    accepts: ClassVar[tuple[str, ...]] = ()
    _unused: ClassVar[tuple[str, ...]] = (
        "kernel_rank",
        "stack_rank",
        "stack_modes",
        "clip_ranks",
        "init",
        "init_weights",
        "flora_dropout",
        "forward",
        "fold_pattern",
        "target_parameters",
        "use_dora",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.method
        defaults = {field.name: field for field in dataclasses.fields(FloraConfig)}
        for name in self._unused:
            field, value = defaults[name], getattr(self, name)
            default = field.default_factory() if callable(field.default_factory) else field.default
            if name not in self.accepts and value != default:
                raise ValueError(f"{name}: {self.method.value.lower()} has no such setting; leave it out")
        if not isinstance(self.r, int):
            raise ValueError(f"r: {self.method.value.lower()} takes one integer, got {self.r}")


class FormLayer(FloraLayer):
    """A layer whose update is made by a ``Form`` instead of a core and its factors."""

    other_param_names = (*FloraLayer.other_param_names, "forms")
    stackable = False
    forms: dict[str, Form]

    @override
    def update_layer(self, adapter_name: str, config: Any, name: str) -> None:
        (described,) = self.describe_weights(config, name)
        rank = configured(config.rank_pattern, name, described)
        rank = config.r if rank is None else rank
        if not isinstance(rank, int):
            raise ValueError(f"rank_pattern: {config.method.value.lower()} takes one integer for {name}, got {rank}")
        try:
            form = config.form(described.weight_shape, rank, getattr(self.get_base_layer(), "groups", 1))
        except ValueError as error:
            raise ValueError(f"target_modules: {name}: {error}") from None
        self.__dict__.setdefault("forms", {})[adapter_name] = form
        self.weights[adapter_name] = {described.name: described}
        self.effective_ranks[adapter_name] = {described.name: (rank,)}
        self.scaling[adapter_name] = scaling_of(described, config, name)
        self._configured_scaling[adapter_name] = self.scaling[adapter_name]
        self.form[adapter_name] = "auto"
        self.tucker_dropout[adapter_name] = nn.Identity()
        self._quantised = not self.base_weight(described.name).is_floating_point()
        if self._quantised and not self.can_add(adapter_name):
            raise ValueError(f"{name}: a quantised convolution cannot be adapted; leave it out of the targets")
        self.tucker_factors[adapter_name] = nn.ParameterDict(
            {key: nn.Parameter(torch.empty(shape)) for key, shape in form.shapes().items()}
        )
        self.reset_adapter(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if config.use_dora:
            self._init_magnitude(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @override
    @torch.no_grad()
    def reset_adapter(self, adapter_name: str, config: Any) -> None:
        self.forms[adapter_name].start(self.tucker_factors[adapter_name])

    @override
    def get_delta_weight(self, adapter: str, weight: str | None = None) -> Tensor:
        (described,) = self.weights[adapter].values()
        update = self.forms[adapter].update(self.tucker_factors[adapter])
        return update.reshape(described.weight_shape) * self.scaling[adapter]


class FormLinear(FormLayer, Linear):
    """A linear layer that passes its input through the two thin matrices of its form."""

    @override
    def matrix_factors(self, adapter: str, core_side: str) -> tuple[Tensor, Tensor]:
        left, right = self.forms[adapter].thin(self.tucker_factors[adapter])
        return left * self.scaling[adapter], right

    @override
    def core_side(self, adapter: str) -> str:
        return "rows"

    @override
    def prefers_adding(self, adapter_name: str) -> bool:
        return True


class FormConv(FormLayer, ConvNd):
    """A convolution that runs with W + update, as in loralib."""

    @override
    def can_add(self, adapter_name: str) -> bool:
        return False


class RivalModel(FloraModel):
    """The PEFT tuner of a rival: which of its layers stands in for which module."""

    layers: ClassVar[Layers] = ((LINEAR, FormLinear), (CONV, FormConv))

    @classmethod
    @override
    def _create_new_module(  # type: ignore[override]
        cls, config: Any, adapter_name: str, target: nn.Module, name: str
    ) -> FloraLayer:
        for kinds, layer in cls.layers:
            if isinstance(target, kinds):
                return layer(target, adapter_name, config, name)
        supported = ", ".join(kind.__name__ for kinds, _ in cls.layers for kind in kinds)
        raise ValueError(
            f"target_modules: {name} is a {type(target).__name__}; {config.method.value} takes {supported}"
        )

    @override
    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: only FLoRA's adapters are combined."""
        raise ValueError(f"{type(self).__name__} cannot combine adapters; merge them one after the other")


def register(config: type[Any], model: type[Any]) -> None:
    """Write a method into PEFT's tables; see ``flora.adapters.register``."""
    tables: tuple[tuple[dict[Any, Any], Any], ...] = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, config),
        (PEFT_TYPE_TO_TUNER_MAPPING, model),
        (PEFT_TYPE_TO_PREFIX_MAPPING, model.prefix),
    )
    for table, entry in tables:
        table[config.method] = entry
