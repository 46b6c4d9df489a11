"""Groups of parameters for the optimizer: which learning rate and which decay each parameter has."""

from collections.abc import Iterable, Sequence
from typing import Any

from timm.models import group_parameters
from torch import nn

from flora.errors import ConfigError
from flora.methods.heads import in_head
from flora.training.settings import TrainerSettings


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], head: Sequence[str], scales: dict[str, float], settings: TrainerSettings
) -> list[dict[str, Any]]:
    """Groups of the trained parameters: a rate for adapter or backbone and one for the head; 1-D ones do not decay.

    Args:
        named: parameters by name, possibly behind the prefix of a wrapper.
        head: names of the classifier modules.
        scales: factors of the rates by name, see ``layer_scales``; 1 where a name is missing.
        settings: with the rates and the decay.
    """
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            name = name.removeprefix("module.")
            key = (in_head(name, head), parameter.ndim > 1, scales.get(name, 1.0))
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": ((is_head and settings.head_lr) or settings.lr) * scale,
            "weight_decay": settings.weight_decay if decays else 0.0,
        }
        for (is_head, decays, scale), parameters in groups.items()
    ]


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Factors of the learning rates by parameter: 1 for the last layer, ``decay`` for the one before, and so on.

    Layers are those that timm counts; without decay there is nothing to scale.

    Raises:
        ConfigError: a network that does not say what its layers are.
    """
    if decay in (0, 1):
        return {}
    if not hasattr(model, "group_matcher"):
        raise ConfigError("trainer.layer_decay: only networks of timm that are trained in full have layers to scale")
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    last = max(layers.values())
    return {name: decay ** (last - layer) for name, layer in layers.items()}
