"""A training step through torch.compile, FLoRA's weights built within the compiled region."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def run(model: nn.Module, together: Any, dtype: str) -> Callable[..., Any]:
    """The network's forward pass through torch.compile.

    Args:
        model: the network, as accelerate wraps it.
        together: a block of ``flora.batched``, entered within what is compiled; a null context: none. Not around DDP,
            at which torch.compile breaks the graph.
        dtype: that of autocast, or ``fp32``. The block is entered under the autocast that the network enters later.
    """
    if isinstance(together, contextlib.nullcontext) or isinstance(model, nn.parallel.DistributedDataParallel):
        return torch.compile(model)
    whole = together(model)
    if dtype == "fp32":
        return torch.compile(whole)
    kind, cast = next(model.parameters()).device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(kind, cast):
            return whole(*args, **kwargs)

    return torch.compile(forward)
