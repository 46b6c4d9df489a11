"""FLoRA: parameter-efficient fine-tuning of weights of any dimension by a Tucker form, as a PEFT method."""

from flora.adapters import FloraConfig, FloraModel

__version__ = "0.1.0"
__all__ = ["FloraConfig", "FloraModel", "__version__"]
