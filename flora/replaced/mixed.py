"""Batches whose examples take different adapters: ``adapter_names`` in forward and generate, as PEFT's LoRA has it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

BASE = "__base__"  # PEFT's name for an example without adapter


@contextmanager
def passing_names(tuner: Any, kwargs: dict[str, Any]) -> Iterator[None]:
    """Hand ``adapter_names``, if given, to every adapted layer and trained copy of a module while this is open.

    Args:
        tuner: the ``ReplacedModel``.
        kwargs: keyword arguments of forward or generate. generate repeats each example for its beams and returned
            sequences, except in an encoder; the names are repeated alike.

    Raises:
        ValueError: in training, for unknown names, and for adapters of layers that cannot take them example by example.
        TypeError: if the names are not a list.
    """
    names = kwargs.get("adapter_names")
    if names is None:
        yield
        return
    _check(tuner, names)
    generation = kwargs.get("generation_config")
    sizes = [kwargs.get(key, getattr(generation, key, None)) for key in ("num_beams", "num_return_sequences")]
    repeats = max([size for size in sizes if isinstance(size, int)], default=1)
    repeated = [name for name in names for _ in range(repeats)]
    encoder = tuner.model.get_encoder() if hasattr(tuner.model, "get_encoder") else None
    unrepeated = set() if encoder is None or encoder is tuner.model else set(encoder.modules())
    handles = [
        module.register_forward_pre_hook(
            partial(_add_names, list(names) if module in unrepeated else repeated), with_kwargs=True
        )
        for module in tuner.modules()
        if getattr(module, "takes_adapter_names", isinstance(module, AuxiliaryTrainingWrapper))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_names(names: list[str], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


def _check(tuner: Any, names: Any) -> None:
    if not isinstance(names, list | tuple):
        raise TypeError(f"adapter_names: must be a list with one name per example, got {type(names).__name__}")
    if tuner.training:
        raise ValueError("adapter_names: only for inference; call model.eval() first")
    wanted = set(names) - {BASE}
    if unknown := sorted(wanted - tuner.peft_config.keys()):
        raise ValueError(f"adapter_names: no adapter is called {', '.join(unknown)}")
    for name, layer in tuner.model.named_modules():
        if not isinstance(layer, tuner.tuner_layer_cls):
            continue
        present = sorted(wanted & layer.weights.keys())
        if present and not layer.takes_adapter_names:
            kind = type(layer.get_base_layer()).__name__
            raise ValueError(
                f"adapter_names: {name} ({kind}) cannot run examples of one batch under different adapters; "
                "only linear layers, embeddings and convolutions can"
            )
        if magnitudes := [adapter for adapter in present if adapter in layer.tucker_magnitude]:
            raise ValueError(f"adapter_names: {magnitudes[0]} has use_dora, whose layers take one adapter per batch")
        if layer.merged:
            raise ValueError("adapter_names: adapters are merged; call unmerge_adapter() first")


def run_mixed(layer: Any, names: Sequence[str], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run a ``ReplacedLayer`` with each example of the batch (dimension 0) under the adapter of its name.

    Raises:
        ValueError: if there are not as many names as examples.
    """
    if len(names) != len(input):
        raise ValueError(f"adapter_names: {len(names)} names for a batch of {len(input)}; give one per example")
    result = layer.base_layer(input, *args, **kwargs)
    if layer.disable_adapters:
        return result
    for adapter in layer._present(list(dict.fromkeys(names))):
        rows = torch.tensor([row for row, name in enumerate(names) if name == adapter], device=result.device)
        part = input[rows.to(input.device)]
        if layer.apart(adapter) is not None:
            update = layer.delta_output(adapter, part, *args, **kwargs).to(result.dtype)
            result = result.index_add(0, rows, update)
        else:
            # Not layer.adapted_weight, which may be what was built for the active adapters.
            bases = {name: layer.base_weight(name) for name in layer.weights[adapter]}
            weights = {name: layer.add_delta(base, adapter, name).to(base.dtype) for name, base in bases.items()}
            result = result.index_copy(0, rows, layer.run_base(weights, part, *args, **kwargs).to(result.dtype))
    return result
