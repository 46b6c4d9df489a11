"""Pretrained backbones: what they are, where their weights come from, how inputs enter them."""

from flora.models.llava import Llava
from flora.models.presets import PRESETS, convnext, efficientnet_lite0, get, llava_mini, load, minilm_l6, smollm2_135m
from flora.models.text import TransformersModel
from flora.models.vision import TimmModel
from flora.models.weights import Source, resolve

__all__ = [
    "PRESETS",
    "Llava",
    "Source",
    "TimmModel",
    "TransformersModel",
    "convnext",
    "efficientnet_lite0",
    "get",
    "llava_mini",
    "load",
    "minilm_l6",
    "resolve",
    "smollm2_135m",
]
