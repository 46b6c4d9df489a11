"""FLoRA with one idea taken away at a time: its modes (flora_flat), locality (flora_shuffled), core (flora_nocore).

flora_flat and flora_nocore spend what FLoRA of the configured ``r`` and ``kernel_rank`` would: their ranks are solved
over all layers together, and written to ``rank_pattern``. flora_kernelfree needs no code: it is FLoRA with a large
``kernel_rank``.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from flora.adapters.config import FloraConfig, PeftMethod
from flora.adapters.conv import ConvNd
from flora.adapters.layer import FloraLayer
from flora.adapters.linear import Linear
from flora.adapters.tucker import parameter_count
from flora.adapters.weights import AdaptedWeight, ranks_of
from flora.methods.rivals.form import CONV, LINEAR, Form, FormConv, FormLinear, RivalConfig, RivalModel


def solve_ranks(
    budgets: Mapping[str, int], cost: Mapping[str, Callable[[int], int]], highest: Mapping[str, int]
) -> dict[str, int]:
    """One rank per layer, whose costs together come as close to the sum of the budgets as they can from below.

    Every layer gets the largest rank that its own budget pays, at least 1; what is over or missing is then given or
    taken one rank at a time, where the layer is furthest below or above its budget.

    Args:
        budgets: parameters per layer.
        cost: rank -> parameters, growing, per layer.
        highest: largest useful rank per layer.

    Raises:
        ValueError: rank 1 everywhere costs more.
    """
    ranks = {}
    for name, budget in budgets.items():
        ranks[name] = next((r - 1 for r in range(2, highest[name] + 1) if cost[name](r) > budget), highest[name])
    left = sum(budgets.values()) - sum(cost[name](r) for name, r in ranks.items())

    def gap(name: str) -> float:
        return 1 - cost[name](ranks[name]) / budgets[name]

    while left < 0:
        lowerable = [name for name, r in ranks.items() if r > 1]
        if not lowerable:
            raise ValueError(
                f"r: the smallest adapter takes {-left} parameters more than FLoRA of these ranks; raise r"
            )
        name = min(lowerable, key=gap)
        left += cost[name](ranks[name]) - cost[name](ranks[name] - 1)
        ranks[name] -= 1
    while True:
        steps = {n: cost[n](r + 1) - cost[n](r) for n, r in ranks.items() if r < highest[n]}
        affordable = [name for name, step in steps.items() if step <= left]
        if not affordable:
            return ranks
        name = max(affordable, key=gap)
        left -= steps[name]
        ranks[name] += 1


class MatchedModel(RivalModel):
    """A tuner that spends what FLoRA of the configured ranks would, unless ``rank_pattern`` gives the ranks."""

    @staticmethod
    def cost(shape: tuple[int, ...]) -> tuple[Callable[[int], int], int]:
        """Parameters of a weight as a function of the rank, and its largest useful rank."""
        raise NotImplementedError

    @override
    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        if peft_config.rank_pattern:
            return
        budgets, costs, highest = {}, {}, {}
        for name, module in model.named_modules():
            if isinstance(module, (*LINEAR, *CONV)) and self._check_target_module_exists(peft_config, name):
                shape = tuple(module.weight.shape)
                kinds = ("channel", "channel", *["kernel"] * (len(shape) - 2))
                asked = ranks_of(AdaptedWeight("weight", shape, shape, kinds), peft_config, name)  # type: ignore[arg-type]
                budgets[name] = parameter_count(shape, asked)
                costs[name], highest[name] = self.cost(shape)
        ranks = solve_ranks(budgets, costs, highest)
        # A pattern also matches endings of names; nothing may come before these.
        peft_config.rank_pattern = {rf"(?<!.){re.escape(name)}": rank for name, rank in ranks.items()}


# ---------------------------------------------------------------------- flora_flat


@dataclass
class FloraFlatConfig(FloraConfig):
    """flora_flat: FLoRA of the matrix ``[out, in/groups * kernel...]``, so the kernel's modes are lost."""

    method: ClassVar[PeftMethod] = PeftMethod("FLORA_FLAT")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.method


class FlatConv(ConvNd):
    """A convolution whose weight has two modes, outputs and everything else."""

    @override
    def describe_weights(self, config: FloraConfig, name: str) -> list[AdaptedWeight]:
        (plain,) = super().describe_weights(config, name)
        rows, *rest = plain.shape
        return [replace(plain, shape=(rows, math.prod(rest)), kinds=("channel", "channel"))]


class FloraFlatModel(MatchedModel):
    """The PEFT tuner of flora_flat."""

    layers = ((LINEAR, Linear), (CONV, FlatConv))

    @staticmethod
    @override
    def cost(shape: tuple[int, ...]) -> tuple[Callable[[int], int], int]:
        flat = (shape[0], math.prod(shape[1:]))
        return lambda r: parameter_count(flat, (r, r)), min(flat)


# ---------------------------------------------------------------------- flora_nocore


class CpForm(Form):
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
        for mode in sorted(
            int(m) for m in parameters if m != "0"
        ):  # columns of all modes but the first, in their order
            rest = (rest[:, None] * parameters[str(mode)]).flatten(0, 1)
        return parameters["0"] @ rest.T

    @override
    def thin(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        columns = parameters["1"] if "1" in parameters else parameters["0"].new_ones(1, self.rank)
        return parameters["0"], columns.T


@dataclass
class FloraNocoreConfig(RivalConfig):
    """flora_nocore: CP instead of Tucker, one rank for all modes of a layer (a matrix: LoRA)."""

    method: ClassVar[PeftMethod] = PeftMethod("FLORA_NOCORE")
    form: ClassVar[type[Form]] = CpForm
    accepts: ClassVar[tuple[str, ...]] = ("kernel_rank", "clip_ranks", "use_dora")


class FloraNocoreModel(MatchedModel):
    """The PEFT tuner of flora_nocore."""

    layers = ((LINEAR, FormLinear), (CONV, FormConv))

    @staticmethod
    @override
    def cost(shape: tuple[int, ...]) -> tuple[Callable[[int], int], int]:
        total = sum(size for mode, size in enumerate(shape) if size > 1 or mode == 0)
        return lambda r: r * total, math.prod(shape) // max(shape)


# ---------------------------------------------------------------------- flora_shuffled


@dataclass
class FloraShuffledConfig(FloraConfig):
    """flora_shuffled: FLoRA of the weight with its kernel positions in a fixed random order."""

    method: ClassVar[PeftMethod] = PeftMethod("FLORA_SHUFFLED")
    permutation_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.method
        if self.init == "hosvd":
            raise ValueError("init: hosvd reads the weight in its own order; flora_shuffled takes the other starts")
        if self.forward == "factored":
            raise ValueError("forward: flora_shuffled runs with W + update; use auto or merged")
        if self.flora_dropout:
            raise ValueError("flora_dropout: flora_shuffled runs with W + update, which excludes dropout on its input")
        if isinstance(self.permutation_seed, bool) or not isinstance(self.permutation_seed, int):
            raise ValueError(f"permutation_seed: must be an integer, got {self.permutation_seed!r}")


def kernel_order(kernel: tuple[int, ...], seed: int) -> Tensor:
    """The order of a kernel's positions, counted row by row: equal for all kernels of one size and seed."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randperm(math.prod(kernel), generator=generator, device="cpu")  # its values, also on a meta model


class ShuffledConv(ConvNd):
    """A convolution whose update is a Tucker form with permuted kernel positions."""

    other_param_names = (*FloraLayer.other_param_names, "orders")
    orders: dict[str, list[int]]

    @override
    def update_layer(self, adapter_name: str, config: Any, name: str) -> None:
        order = kernel_order(tuple(self.get_base_layer().kernel_size), config.permutation_seed)
        self.__dict__.setdefault("orders", {})[adapter_name] = order.tolist()
        super().update_layer(adapter_name, config, name)

    @override
    def can_add(self, adapter_name: str) -> bool:
        return False

    @override
    def get_delta_weight(self, adapter: str, weight: str | None = None) -> Tensor:
        local = super().get_delta_weight(adapter, weight)
        return local.flatten(2)[..., self.orders[adapter]].reshape(local.shape)


class FloraShuffledModel(RivalModel):
    """The PEFT tuner of flora_shuffled."""

    layers = ((LINEAR, Linear), (CONV, ShuffledConv))
