"""A network with random weights whose linear layers are quantised, layer by layer, as transformers loads one so."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from flora.errors import ConfigError
from flora.methods.heads import in_head

KINDS = {"nf4": "4-bit NormalFloat with double quantisation, as QLoRA has it; needs bitsandbytes"}


def check(kind: str) -> None:
    """Raise ConfigError for a kind whose package is not here."""
    if kind not in KINDS:
        raise ConfigError(f"--quantize must be one of {', '.join(KINDS)}, got {kind!r}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"--quantize {kind}: needs bitsandbytes; pip install 'bitsandbytes>=0.50,<1'")


def quantise(model: nn.Module, dtype: torch.dtype, device: torch.device, head: Sequence[str]) -> nn.Module:
    """Quantise every linear layer but the head and the output embeddings, each when it is moved to ``device``.

    Args:
        model: on the CPU; changed in place. PEFT takes it for one that transformers loaded in 4 bits.
        dtype: of the arithmetic.
        device: where the layers go; the rest of the model stays.
        head: names of the modules that stay as they are.
    """
    import bitsandbytes

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    embedded: Any = model
    output = embedded.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or layer is output or in_head(name, head):
            continue
        double, kind = settings.bnb_4bit_use_double_quant, settings.bnb_4bit_quant_type
        packed = bitsandbytes.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            compute_dtype=settings.bnb_4bit_compute_dtype,
            compress_statistics=double,
            quant_type=kind,
            device="meta",
        )
        packed.weight = bitsandbytes.nn.Params4bit(
            layer.weight.detach(), requires_grad=False, compress_statistics=double, quant_type=kind
        )
        packed.bias = layer.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed.to(device))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    return model
