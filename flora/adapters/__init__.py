"""FLoRA adapters: the math (tucker), and its form as a PEFT method."""

import peft  # noqa: F401  before our modules: its import has flora.registration import them all

from flora.adapters import hotswap
from flora.adapters.config import FloraConfig
from flora.adapters.gradients import init_from_gradients
from flora.adapters.layer import FloraLayer
from flora.adapters.model import FloraModel
from flora.adapters.passes import batched
from flora.adapters.rates import parameter_groups
from flora.adapters.register import register
from flora.replaced import lora_only

register(FloraConfig, FloraModel)
hotswap.install()
lora_only.install()

__all__ = ["FloraConfig", "FloraLayer", "FloraModel", "batched", "init_from_gradients", "parameter_groups"]
