"""Pretrained backbones: what they are, where their weights come from, how inputs enter them.

The names below are public, and the ones that configs use: they stay where they are, wherever their code moves.
"""

from typing import Any

from flora import names

_HOMES = {
    "PRESETS": "presets",
    "InternVit": "internvit",
    "Llava": "llava",
    "OwnModule": "own",
    "Source": "weights",
    "TimmModel": "vision",
    "TransformersModel": "text",
    "UperNet": "segmentation",
    "convnext": "presets",
    "efficientnet_lite0": "presets",
    "get": "presets",
    "llava_mini": "presets",
    "load": "presets",
    "minilm_l6": "presets",
    "resnet": "presets",
    "resolve": "weights",
    "smollm2_135m": "presets",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    return names.public(__name__, _HOMES, name)
