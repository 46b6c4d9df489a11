"""Whether PEFT still has what our classes build on, asked of a version that this was not tested with."""

import inspect
from collections.abc import Iterator
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

# What is called and not overridden.
CALLED: dict[type, tuple[str, ...]] = {
    BaseTuner: ("get_model_config", "_check_tied_module_exists", "_get_module_names_tied_with_embedding"),
    BaseTunerLayer: ("_get_embed_scale", "_move_adapter_to_device_of_base_layer", "set_adapter", "active_adapters"),
}


def changes() -> list[str]:
    """What PEFT no longer has, calls otherwise, or newly demands, as far as our classes can tell: names to report."""
    found = [
        f"{owner.__name__}.{name} is gone" for owner in CALLED for name in CALLED[owner] if not hasattr(owner, name)
    ]
    for ours in _our_classes():
        found += [f"{ours.__name__} lacks {name}" for name in sorted(getattr(ours, "__abstractmethods__", ()))]
        for position, owner in enumerate(ours.__mro__):
            if owner.__module__.startswith("flora."):
                for name, method in vars(owner).items():
                    found += _differences(owner, name, method, ours.__mro__[position + 1 :])
    return sorted(set(found))


def _our_classes() -> Iterator[Any]:
    for table in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING):
        for entry in table.values():
            if entry.__module__.startswith("flora."):
                yield entry
                yield from (layer for _, layer in getattr(entry, "layer_classes", ()))


def _differences(owner: type, name: str, method: Any, bases: tuple[type, ...]) -> Iterator[str]:
    method = getattr(method, "__func__", getattr(method, "fget", method))
    base = next((base for base in bases if name in vars(base)), None)
    if base is None:
        if getattr(method, "__override__", False):  # set by typing's override
            yield f"{owner.__name__} overrides {name}, which is gone"
        return
    theirs = getattr(vars(base)[name], "__func__", vars(base)[name])
    if not base.__module__.startswith("peft.") or not inspect.isfunction(theirs) or not inspect.isfunction(method):
        return
    known = inspect.signature(method).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    for parameter in inspect.signature(theirs).parameters.values():
        if parameter.name not in known and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            yield f"{base.__name__}.{name} takes {parameter.name}"
