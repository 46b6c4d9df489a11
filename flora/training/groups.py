"""Groups of parameters for the optimizer: which learning rate and which decay each parameter has."""

import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from peft import PeftModel
from timm.models import ConvNeXt, group_parameters
from torch import nn

from flora.errors import ConfigError
from flora.methods.heads import in_head
from flora.models.feature_maps import FeatureMaps
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


def layer_scales(model: nn.Module, decay: float, kind: str | None = None) -> dict[str, float]:
    """Factors of the learning rates by parameter: 1 for the head, ``decay`` for the last layer, and so on downwards.

    Layers of ConvNeXts are those of ConvNeXt-V2's optim_factory.py (facebookresearch/ConvNeXt-V2 @2553895): ``single``
    makes one of each block, with the downsampling before it; ``group`` makes 12 of three blocks each, which suits the
    depths [3, 3, 27, 3] of base and larger ones, and one of the stem. Layers of other networks are those that timm
    counts. Without decay there is nothing to scale.

    Args:
        model: a network of timm, or one with ``FeatureMaps`` of it as ``backbone``; heads and norms over those have 1.
        decay: the factor, 0 or 1 for none.
        kind: ``single``, which None means too, or ``group``.

    Raises:
        ConfigError: a network that does not say what its layers are, or has no groups.
    """
    if decay in (0, 1):
        return {}
    if isinstance(backbone := getattr(model, "backbone", None), FeatureMaps):
        below = layer_scales(backbone.network, decay, kind)  # ConvNeXt's count a head, others' what is there
        last = 1.0 if isinstance(backbone.network, ConvNeXt) else decay
        return {f"backbone.network.{name}": scale * last for name, scale in below.items()}
    if isinstance(model, ConvNeXt):
        depths = [len(stage.blocks) for stage in model.stages]  # type: ignore[union-attr, arg-type]
        last = _GROUPS if kind == "group" else sum(depths)
        layer = _group if kind == "group" else partial(_single, depths=depths)
        return {name: decay ** (last + 1 - layer(*_place(name))) for name, _ in model.named_parameters()}
    if kind == "group":
        raise ConfigError("trainer.layer_decay_type=group is for ConvNeXts that are trained in full: take single")
    if not hasattr(model, "group_matcher") or isinstance(model, PeftModel):
        raise ConfigError("trainer.layer_decay: only networks of timm that are trained in full have layers to scale")
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    last = max(layers.values())
    return {name: decay ** (last - layer) for name, layer in layers.items()}


_GROUPS = 12
_BLOCKS_OF_A_GROUP = 3


def _place(name: str) -> tuple[int, int | None]:
    """Stage and block of a parameter of a ConvNeXt: block None for what downsamples before the stage, stage 4 after."""
    if name.startswith("stem."):
        return 0, None
    if found := re.match(r"stages\.(\d+)\.(?:downsample|blocks\.(\d+))\.", name):
        return int(found[1]), None if found[2] is None else int(found[2])
    return 4, None


def _single(stage: int, block: int | None, depths: Sequence[int]) -> int:
    return sum(depths[:stage]) + (block or 0) + 1


def _group(stage: int, block: int | None) -> int:
    if stage == 2 and block is not None:
        return min(3 + block // _BLOCKS_OF_A_GROUP, _GROUPS - 1)
    return {0: 0 if block is None else 1, 1: 2, 2: 3, 3: _GROUPS, 4: _GROUPS + 1}[stage]
