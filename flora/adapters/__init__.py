"""FLoRA adapters: the math (tucker), and its form as a PEFT method."""

import peft  # noqa: F401  before our modules: its import has flora.registration import them all

from flora.adapters.config import FloraConfig
from flora.adapters.layer import FloraLayer
from flora.adapters.model import FloraModel
from flora.adapters.passes import batched
from flora.adapters.register import register

register(FloraConfig, FloraModel)

__all__ = ["FloraConfig", "FloraLayer", "FloraModel", "batched"]
