"""FLoRA adapters: the math (tucker), and its form as a PEFT method."""

from flora.adapters.config import FloraConfig
from flora.adapters.layer import FloraLayer
from flora.adapters.model import FloraModel
from flora.adapters.register import register

register()

from flora.adapters import rivals  # noqa: E402  builds on the above, and registers its methods likewise

__all__ = ["FloraConfig", "FloraLayer", "FloraModel", "rivals"]
