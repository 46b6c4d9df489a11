"""Weights that several modules share, as an embedding and an output layer do: adapted at both ends, merged at one."""

import dataclasses
from collections import Counter
from typing import Any

from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import find_parameter_name_by_module
from torch import nn


def note_tied_weights(model: nn.Module, layers: list[Any]) -> None:
    """Tell adapted layers which of their weights other modules hold too: merging must leave those modules theirs."""
    owners = Counter(id(value) for module in model.modules() for value in module._parameters.values())
    for layer in layers:
        names = {name for weights in layer.weights.values() for name in weights}
        own = {name: _parameter(layer, name) for name in names}  # None where a parametrization computes it
        layer.tied_weights = {name for name, value in own.items() if value is not None and owners[id(value)] > 1}


def check_tokens(model: nn.Module) -> None:
    """Raise ValueError if different tokens are trained at the ends of one weight: they cannot all be merged into it."""
    ends = [layer for layer in model.modules() if isinstance(layer, TrainableTokensLayer) and not layer.tied_adapter]
    weights = [id(layer.get_base_layer().weight) for layer in ends]
    if len(set(weights)) < len(weights):
        raise ValueError(
            "trainable_token_indices: the ends of a tied weight train different tokens and cannot be merged; give "
            "them the same, or load the model with tie_word_embeddings=False"
        )


def _parameter(layer: Any, name: str) -> Any:
    owner, _, attribute = name.rpartition(".")
    return layer.get_base_layer().get_submodule(owner)._parameters.get(attribute)


def untie(layer: Any, name: str) -> None:
    """Give the layer a parameter of its own in place of one that it shares; ``tie_again`` undoes it."""
    if name in layer.tied_weights and name not in layer.shared_weights:
        shared = _parameter(layer, name)
        layer.shared_weights[name] = shared
        _set(layer, name, nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad))


def tie_again(layer: Any) -> None:
    """Give the layer back the parameters that it shared: nothing was added to them."""
    while layer.shared_weights:
        name, shared = layer.shared_weights.popitem()
        shared.data = shared.data.to(_parameter(layer, name))  # the model may have been moved
        _set(layer, name, shared)


def follow_source(layer: Any) -> None:
    """Where a layer shares its adapters with another and both are merged alike, have them share the merged weight."""
    source = layer.tied_source
    if source is None or layer.merged_adapters != source.merged_adapters or not layer.shared_weights:
        return
    if all(layer.tucker_core[adapter] is source.tucker_core[adapter] for adapter in layer.merged_adapters):
        _set(layer, "weight", source.get_base_layer().weight)


def _set(layer: Any, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(layer.get_base_layer().get_submodule(owner), attribute, parameter)


def share_adapter(layer: Any, source: Any, adapter: str, name: str) -> None:
    """Have a layer use the parameters, ranks and scale of another's adapter, whose weight it shares.

    Raises:
        ValueError: if the other is not adapted, or an update of the one is none of the other.
    """
    if adapter not in getattr(source, "weights", ()):
        raise ValueError(f"ensure_weight_tying: {name} is tied to an input embedding that is not adapted")
    if adapter in layer.tucker_magnitude:
        raise ValueError(f"ensure_weight_tying: {name} cannot share magnitudes with the embedding; set use_dora=False")
    if layer.weights[adapter]["weight"].weight_shape != source.weights[adapter]["weight"].weight_shape:
        raise ValueError(f"ensure_weight_tying: {name} does not have the embedding's shape")
    for attribute in ("tucker_core", "tucker_factors", "effective_ranks", "scaling", "_configured_scaling"):
        getattr(layer, attribute)[adapter] = getattr(source, attribute)[adapter]
    theirs = source.weights[adapter]["weight"]
    own = layer.weights[adapter]["weight"]
    layer.weights[adapter]["weight"] = dataclasses.replace(own, shape=theirs.shape, kinds=theirs.kinds)
    layer.__dict__["tied_source"] = source  # not a child


def add_modules_to_save(tuner: Any, config: Any, tied: list[str]) -> None:
    """Have PEFT train a copy of the input embedding and tie the other ends to it."""
    config.modules_to_tie = set(tied)
    source = find_parameter_name_by_module(tuner.model, tuner.model.get_input_embeddings())
    ends = [source, *tied]
    rest = [name for name in config.modules_to_save or [] if not any(_ends_with(end, name) for end in ends)]
    config.modules_to_save = [*rest, source]


def add_targets(tuner: Any, config: Any, tied: list[str]) -> None:
    """Have the input embedding adapted, and PEFT hand its tied ends to the tuner after it."""
    config.target_modules_to_tie = set(tied)
    source = find_parameter_name_by_module(tuner.model, tuner.model.get_input_embeddings())
    if isinstance(config.target_modules, str):
        config.target_modules = f"(?:{config.target_modules})|{source.replace('.', '[.]')}"
    else:
        rest = {name for name in config.target_modules if not any(_ends_with(end, name) for end in [source, *tied])}
        config.target_modules = rest | {source}


def _ends_with(full_name: str, name: str) -> bool:
    return full_name == name or full_name.endswith(f".{name}")
