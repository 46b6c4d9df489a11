"""Ranks with which an ablation spends what FLoRA would: solved over all layers together."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from typing_extensions import override

from flora.adapters.tucker import parameter_count
from flora.adapters.weights import ranks_of
from flora.methods.rivals.base import CONV, LINEAR
from flora.replaced.model import ReplacedModel
from flora.replaced.weights import AdaptedWeight


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


class MatchedRanks(ReplacedModel):
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
