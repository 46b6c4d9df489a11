"""Pretrained backbones: what they are, where their weights come from, how inputs enter them."""

from flora.models.presets import PRESETS, convnext, efficientnet_lite0, get, load
from flora.models.vision import TimmModel
from flora.models.weights import Source, resolve

__all__ = ["PRESETS", "Source", "TimmModel", "convnext", "efficientnet_lite0", "get", "load", "resolve"]
