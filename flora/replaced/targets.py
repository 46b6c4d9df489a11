"""What ``target_modules="all"`` names: every layer of a model that a method can adapt, but for the model's head."""

import contextlib
import re
import warnings
from collections.abc import Callable, Collection
from typing import Any

from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers import PreTrainedModel

ALL = "all"
_HEADS = ("classifier", "fc", "head", "heads", "score")  # of torchvision, and of many a network of one's own
_BESIDE = ("aux_head", "aux1", "aux2", "AuxLogits", "projector")  # what else gives outputs, of some networks
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def choose(config: Any, model: nn.Module, adapts: Callable[[nn.Module], bool]) -> None:
    """Put the names of layers into a config that asks for ``all``; warn where ``all-linear`` passes convolutions over.

    Args:
        config: of the adapter; its ``modules_to_save`` are no targets either.
        model: the network.
        adapts: whether the method can adapt a module.

    Raises:
        ValueError: there is no such layer.
    """
    if config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        _warn_of_convolutions(model)
    if config.target_modules != ALL:
        return
    outputs = heads(model) if _says(model) or not config.modules_to_save else []
    if not config.modules_to_save and not _says(model):
        taken = f"{', '.join(outputs)} for the head" if outputs else "no layer for a head"
        warnings.warn(
            f"target_modules: '{ALL}' takes {taken} of {type(model).__name__}, by its name: name the head in "
            "modules_to_save, or in exclude_modules",
            stacklevel=4,
        )
    ends = [*(config.modules_to_save or []), *_replaced_tokens(config, model)]
    names: list[str] = []
    for name, module in model.named_modules():
        # A part of an adapted layer, such as the output projection of an attention, is adapted with it.
        without = any(f"{name}.".startswith(f"{outer}.") for outer in (*names, *outputs))
        if name and adapts(module) and not without and not any(f".{end}." in f".{name}." for end in ends):
            names.append(name)
    if not names:
        raise ValueError(f"target_modules: {type(model).__name__} has no layer outside its head that can be adapted")
    config.target_modules = names
    left_out = [n for n in names if isinstance(check_target_module_exists(config, n), _ExcludedModule)]
    config.target_modules = exactly([name for name in names if name not in left_out], model)


def heads(model: nn.Module) -> list[str]:
    """Names of the modules that make a network's outputs, as far as the network or its names tell.

    Those of transformers say what lies beyond their base model, and timm's which module classifies. Of others it is the
    last layer of a child that is called classifier, fc, head, heads or score. A word embedding that is tied to the
    output layer counts too.
    """
    found: list[Any] = []
    base = model.base_model if isinstance(model, PreTrainedModel) else model
    if isinstance(model, PreTrainedModel):
        found += [child for child in model.children() if base is not model and base not in child.modules()]
        found += [model.get_output_embeddings()]
    if callable(classifier := getattr(base, "get_classifier", None)):
        with contextlib.suppress(TypeError):  # another method of that name
            modules = classifier()
            found += modules if isinstance(modules, tuple) else [modules]
    if not any(isinstance(module, nn.Module) for module in found):
        found += [_last(child) for name, child in model.named_children() if name in _HEADS]
    found += [child for name, child in model.named_children() if name in _BESIDE and base is model]
    weights = [w for head in found for w in (getattr(head, "weight", None),) if w is not None]
    tied = [m for m in model.modules() if isinstance(m, nn.Embedding) and any(m.weight is w for w in weights)]
    return [name for name, module in model.named_modules() if name and any(module is m for m in [*found, *tied])]


def _says(model: nn.Module) -> bool:
    """Whether a network says itself what its head is, as those of transformers and timm do."""
    return isinstance(model, PreTrainedModel) or callable(getattr(model, "get_classifier", None))


def exactly(names: Collection[str], model: nn.Module) -> str | list[str]:
    """The names for PEFT, which also takes endings of names: a regular expression where others end in one of them."""
    wanted = set(names)
    for name, _ in model.named_modules():
        parts = name.split(".")
        if name not in wanted and any(".".join(parts[i:]) in wanted for i in range(1, len(parts))):
            return "|".join(re.escape(name) for name in names)
    return list(names)


def _replaced_tokens(config: Any, model: nn.Module) -> list[str]:
    """Names of the embeddings of which ``trainable_token_indices`` replaces rows."""
    tokens = getattr(config, "trainable_token_indices", None)
    if isinstance(tokens, dict) or not tokens:
        return [*(tokens or ())]
    embedding = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    return [name for name, module in model.named_modules() if module is embedding]


def _last(module: nn.Module) -> nn.Module | None:
    layers = [m for m in module.modules() if isinstance(m, (nn.Linear, *_CONVOLUTIONS))]
    return layers[-1] if layers else None


def _warn_of_convolutions(model: nn.Module) -> None:
    convolutions = sum(isinstance(module, _CONVOLUTIONS) for module in model.modules())
    if convolutions > sum(isinstance(module, nn.Linear) for module in model.modules()):
        warnings.warn(
            f"target_modules: all-linear leaves the {convolutions} convolutions of {type(model).__name__} alone; "
            f"'{ALL}' adapts them too",
            stacklevel=4,
        )
