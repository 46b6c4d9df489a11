"""Learning rates of cores and factors apart, as LoRA+ (arXiv 2402.12354) has them for LoRA's two matrices."""

import math
from numbers import Real
from typing import Any

from torch import nn


def core_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained cores of all FLoRA adapters of a model, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad and ".tucker_core." in f".{n}"}


def parameter_groups(model: nn.Module, lr: float, core_lr_ratio: float = 1.0) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, in which cores learn at ``core_lr_ratio`` times the rate of all else.

        optimizer = torch.optim.AdamW(flora.parameter_groups(model, lr=3e-3, core_lr_ratio=4), weight_decay=1e-4)

    Args:
        model: with FLoRA adapters; parameters that need no gradient are left out.
        lr: of factors, heads and whatever else is trained.
        core_lr_ratio: above 0.

    Returns:
        ``[{"params", "lr"}, ...]``: the cores, then all others; an empty group is left out.

    Raises:
        ValueError: the model trains no core, or a rate or ratio is no number above 0.
    """
    cores = core_parameters(model)
    if not cores:
        raise ValueError("model: it trains no core of FLoRA (tucker_core), so that there is nothing to give a rate")
    if not all(isinstance(number, Real) and 0 < number < math.inf for number in (lr, core_lr_ratio)):
        raise ValueError(f"lr and core_lr_ratio must be numbers above 0, got {lr!r} and {core_lr_ratio!r}")
    others = [p for name, p in model.named_parameters() if p.requires_grad and name not in cores]
    groups = [{"params": list(cores.values()), "lr": lr * core_lr_ratio}, {"params": others, "lr": lr}]
    return [group for group in groups if group["params"]]
