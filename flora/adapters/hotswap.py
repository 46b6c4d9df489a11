"""Puts another FLoRA adapter in the place of a loaded one, through the functions of ``peft.utils.hotswap``."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft.utils import hotswap
from torch import Tensor, nn

from flora.adapters.config import FLORA, FloraConfig
from flora.adapters.layer import FloraLayer
from flora.adapters.parameters import Parameters

_peft_swap, _peft_prepare = hotswap.hotswap_adapter_from_state_dict, hotswap._convert_scalings_to_tensor


def swap(
    model: Any, state_dict: dict[str, Tensor], adapter_name: str, config: Any, parameter_prefix: str = "lora_"
) -> None:
    """Replace an adapter by that of a state dict, as if it had been loaded anew: ranks and scales may differ.

    Layers that the new adapter leaves alone get a zero update. Stands in for PEFT's own
    ``hotswap_adapter_from_state_dict``, which it calls for configurations of other methods.

    Args:
        model: the ``PeftModel``, or the model into which adapters were injected; compiled or not.
        state_dict: the new parameters, under the names that they have in the model.
        adapter_name: the adapter to replace.
        config: the configuration of the new adapter.
        parameter_prefix: for other methods.

    Raises:
        ValueError: if the adapter is merged, or one of the two trains more than adapted layers.
        RuntimeError: if the new adapter adapts what the old one does not, or its tensors do not fit its configuration.
    """
    if not isinstance(config, FloraConfig):
        return _peft_swap(model, state_dict, adapter_name, config, parameter_prefix)
    model = getattr(model, "_orig_mod", model)
    old = model.peft_config[adapter_name]
    for field in ("modules_to_save", "trainable_token_indices", "ensure_weight_tying"):
        if getattr(old, field) or getattr(config, field):
            raise ValueError(f"hotswap: adapters with {field} cannot be swapped; load the new one beside the old")
    if old.bias != "none" or config.bias != "none":
        raise ValueError("hotswap: adapters that train biases cannot be swapped; load the new one beside the old")
    layers = {name: layer for name, layer in model.named_modules() if _carries(layer, adapter_name)}
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"hotswap: {adapter_name} is merged; call unmerge_adapter() first")
    unknown = [key for key in state_dict if not any(key.startswith(f"{name}.tucker_") for name in layers)]
    if unknown:
        raise RuntimeError(
            f"hotswap: the model's {adapter_name} adapts no {unknown[0]}; load the new adapter beside it"
        )
    new = copy.deepcopy(config)
    new.init_weights, new.init, new.inference_mode = True, "orthogonal", old.inference_mode
    before = {layer: _state(layer, adapter_name) for layer in layers.values()}
    try:
        for name, layer in layers.items():
            _renew(layer, _short(model, name), adapter_name, new)
            _check(name, dict(_parameters(layer, adapter_name)), _of_layer(state_dict, name))
    except Exception:
        for layer, states in before.items():
            _put_back(layer, adapter_name, states)
        raise
    for name, layer in layers.items():
        _fill(layer, adapter_name, before[layer], _of_layer(state_dict, name))
    new.init, new.init_weights = config.init, config.init_weights
    new.target_modules = {_short(model, name) for name, layer in layers.items() if not isinstance(layer, Parameters)}
    model.peft_config[adapter_name] = new


def _carries(layer: nn.Module, adapter: str) -> bool:
    return isinstance(layer, FloraLayer) and adapter in layer.weights


def _short(model: Any, name: str) -> str:
    """The layer's name as configurations know it: without the wrappers of PEFT."""
    return name.removeprefix("base_model.model.") if hasattr(model, "base_model") else name


def _of_layer(state_dict: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(f"{prefix}tucker_")}


def _renew(layer: FloraLayer, name: str, adapter: str, config: FloraConfig) -> None:
    """Make the parameters that the new configuration asks for, with a zero update."""
    if isinstance(layer, Parameters):
        layer.target(list(layer.weights[adapter]))
        name = name.removesuffix(layer.child_name).rstrip(".")
    if adapter in layer.tucker_magnitude:
        del layer.tucker_magnitude[adapter]
    layer.update_layer(adapter, config, name)


def _check(name: str, own: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    if not values:
        return
    if odd := sorted(values.keys() ^ own.keys()):
        raise RuntimeError(f"hotswap: {name}.{odd[0]} is {'not in the file' if odd[0] in own else 'not in the model'}")
    for key, parameter in own.items():
        if values[key].shape != parameter.shape:
            raise RuntimeError(
                f"hotswap: {name}.{key} is {list(values[key].shape)}; its configuration says {list(parameter.shape)}"
            )


@torch.no_grad()
def _fill(layer: FloraLayer, adapter: str, before: dict[str, Any], values: dict[str, Tensor]) -> None:
    """Give a renewed adapter its values: in the tensors that it had, where they fit, for who holds on to them."""
    example = next(iter(before["tucker_core"].values()))
    for attribute in layer.adapter_layer_names:
        container, old = getattr(layer, attribute), before[attribute]
        if adapter not in container:
            continue
        for key, parameter in list(container[adapter].named_parameters()):
            value = values.get(f"{attribute}.{adapter}.{key}", parameter)
            kept = old[key] if old is not None and key in old and old[key].shape == value.shape else None
            if kept is None:
                kept = nn.Parameter(torch.empty_like(value, dtype=example.dtype, device=example.device))
            kept.requires_grad_(example.requires_grad).copy_(value)
            container[adapter][key] = kept


def _parameters(layer: FloraLayer, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    for attribute in layer.adapter_layer_names:
        container = getattr(layer, attribute)
        if adapter in container:
            for key, value in container[adapter].named_parameters():
                yield f"{attribute}.{adapter}.{key}", value


def _state(layer: FloraLayer, adapter: str) -> dict[str, Any]:
    containers = {name: getattr(layer, name) for name in layer.adapter_layer_names + layer.other_param_names}
    return {name: dict(held.items()).get(adapter) for name, held in containers.items()}


def _put_back(layer: FloraLayer, adapter: str, states: dict[str, Any]) -> None:
    for name, value in states.items():
        container = getattr(layer, name)
        if value is not None:
            container[adapter] = value
        elif adapter in container:
            del container[adapter]


def _prepare(model: nn.Module) -> bool:
    if any(isinstance(module, FloraLayer) for module in model.modules()):
        raise ValueError(
            "prepare_model_for_compiled_hotswap: FLoRA needs no preparation; swap on the compiled model, which is "
            "compiled anew where ranks or scales differ"
        )
    return _peft_prepare(model)


def install() -> None:
    """Have ``peft.utils.hotswap`` swap FLoRA's adapters too: its functions find these by name when they run."""
    table: dict[Any, list[str]] = hotswap.CONFIG_KEYS_TO_CHECK  # type: ignore[assignment]
    table[FLORA] = []  # no field need agree: what differs is taken over
    hotswap.hotswap_adapter_from_state_dict = swap
    hotswap._convert_scalings_to_tensor = _prepare
