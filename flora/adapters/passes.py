"""The switch for what layers share in a forward pass: ``flora.batched``."""

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

from torch import nn


def batched(model: nn.Module, keep: int = 0) -> contextlib.AbstractContextManager[Any]:
    """A context for a forward pass in which FLoRA builds the weights of all layers of ``model`` together: same result.

    Each layer by itself launches about ten small operations; together, layers of one shape share them. Make it once
    and enter it for every forward pass; the backward pass may lie outside::

        together = flora.batched(model)
        for inputs in data:
            with together:
                loss = model(**inputs).loss
            loss.backward()

    Nothing is kept on the model, and nothing but the grouping of layers from one block to the next. Within a block, a
    layer whose weights, active adapters or scale have changed since, and every layer where operations are recorded or
    repeated (gradient checkpointing, functorch, forward-mode AD, tracing, torch.compile), builds its own. A change
    in place through ``tensor.data`` within a block goes unnoticed, since torch counts no version for it; a step of an
    optimizer is noticed, fused or not. All forward passes of a block share one graph: call backward once for them. What
    a block builds stays in memory until it ends.

    For inference, ``keep`` has a block last over many passes, each as fast as with the adapter merged. Under
    ``torch.no_grad`` or ``torch.inference_mode`` every layer then runs in the merged form, whichever it trains in (the
    results differ in their rounding), unless its adapter was made with ``forward="factored"``; it keeps what it runs
    with, and builds it anew where weights or scale have changed::

        with torch.inference_mode(), flora.batched(model, keep=2):
            for adapter, inputs in requests:
                model.set_adapter(adapter)
                model(**inputs)

    A compiled region builds together only what enters the block within it: ``torch.compile(together(model))`` compiles
    a function that does, under the autocast of the call. There, cores, factors and base weights must not be written to
    in place between the entry and a layer that uses them; what is traced cannot tell.

    Args:
        model: a module with adapted layers, such as a ``peft.PeftModel``; layers added later build their own.
        keep: in how many states (active adapters and their scales) each layer keeps its weight, a copy of it for each;
            0: none outlives a change.

    Returns:
        A context manager that can be entered again and again, by several threads too.

    Raises:
        ValueError: if ``keep`` is below 0.
    """
    if keep < 0:
        raise ValueError(f"keep: must be 0 or more states, got {keep}")
    if (folder := fast()) is None:
        return _Alone()
    return folder.Batched(model, keep)


class _Alone(contextlib.nullcontext[None]):
    """A block in which every layer builds its own."""

    def __call__(self, run: Callable[..., Any]) -> Callable[..., Any]:
        return run


def fast() -> Any:
    """The module that builds weights together; None where the folder ``flora/adapters/fast`` is absent."""
    try:
        return importlib.import_module("flora.adapters.fast.batched")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("flora.adapters.fast"):
            raise
        return None
