"""PEFT's optimisers that find LoRA's matrices by name: they refuse models of ours instead of doing something else."""

from typing import Any

from peft.optimizers import lorafa, loraplus
from torch import nn

from flora.replaced.layer import ReplacedLayer

_parameter_names, _lorafa_init = loraplus.get_parameter_names, lorafa.LoraFAOptimizer.__init__


def _names_of(model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    # The first thing that create_loraplus_optimizer does.
    if any(isinstance(module, ReplacedLayer) for module in model.modules()):
        raise ValueError(
            "create_loraplus_optimizer: only LoRA has the matrices A and B to which LoRA+ gives rates of their own; "
            "flora.parameter_groups(model, lr, core_lr_ratio) gives an optimizer a group of cores and one of the rest"
        )
    return _parameter_names(model, *args, **kwargs)


def _init(self: Any, params: Any, *args: Any, **kwargs: Any) -> None:
    params = list(params)
    if any(".tucker_" in name for group in params if isinstance(group, dict) for name in group.get("names", ())):
        raise ValueError(
            "create_lorafa_optimizer: only LoRA has the matrix A that LoRA-FA freezes; use torch.optim.AdamW, and "
            "requires_grad_(False) on parameters named tucker_factors to train cores alone"
        )
    _lorafa_init(self, params, *args, **kwargs)


def install() -> None:
    """Have ``create_loraplus_optimizer`` and ``create_lorafa_optimizer`` refuse, wherever they were imported."""
    loraplus.get_parameter_names = _names_of
    lorafa.LoraFAOptimizer.__init__ = _init  # type: ignore[method-assign]
