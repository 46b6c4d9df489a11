"""Public names of classes that configs build, apart from where their code lies; and the names they had before."""

import importlib
from collections.abc import Mapping
from typing import Any

# The names under which these were first recorded -> the public names of today. Run ids are hashes of the first names,
# so that records stay found wherever code moves; a new class needs no entry.
FORMER = {
    "flora.adapters.methods.Full": "flora.methods.Full",
    "flora.adapters.methods.LinearProbe": "flora.methods.LinearProbe",
    "flora.adapters.methods.Peft": "flora.methods.Peft",
    "flora.adapters.rivals.adalora.AdaLora": "flora.methods.AdaLora",
    "flora.adapters.rivals.biases.BitFit": "flora.methods.BitFit",
    "flora.adapters.rivals.BottleneckConfig": "flora.methods.BottleneckConfig",
    "flora.adapters.rivals.FloraFlatConfig": "flora.methods.FloraFlatConfig",
    "flora.adapters.rivals.FloraNocoreConfig": "flora.methods.FloraNocoreConfig",
    "flora.adapters.rivals.FloraShuffledConfig": "flora.methods.FloraShuffledConfig",
    "flora.adapters.rivals.LoconConfig": "flora.methods.LoconConfig",
    "flora.adapters.rivals.LoraFlatConfig": "flora.methods.LoraFlatConfig",
    "flora.adapters.rivals.LotrConfig": "flora.methods.LotrConfig",
    "flora.adapters.rivals.MosloraConfig": "flora.methods.MosloraConfig",
    "flora.adapters.rivals.OftConfig": "flora.methods.OftConfig",
    "flora.adapters.rivals.TriloraConfig": "flora.methods.TriloraConfig",
    "flora.adapters.rivals.VptConfig": "flora.methods.VptConfig",
}
# Classes that give other numbers than when they were first recorded under that name: their runs have new ids.
REVISED = {
    "flora.methods.FloraShuffledConfig": "flora.methods.FloraShuffledConfig#2",  # whole models ran unshuffled before
}
_FIRST = {today: first for first, today in FORMER.items()} | REVISED
_KEYS = ("_target_", "config_class")  # under which configs name classes


def current_targets(node: Any) -> Any:
    """A config in which each class stands under its public name."""
    return _renamed(node, FORMER)


def first(node: Any) -> Any:
    """A config in which each class stands under the first name that it was recorded by."""
    return _renamed(node, _FIRST)


def _renamed(node: Any, table: Mapping[str, str]) -> Any:
    if isinstance(node, dict):
        return {
            k: table.get(v, v) if k in _KEYS and isinstance(v, str) else _renamed(v, table) for k, v in node.items()
        }
    return [_renamed(value, table) for value in node] if isinstance(node, list) else node


def public(package: str, homes: Mapping[str, str], name: str) -> Any:
    """A public name of a package, imported from its home within it; for the package's ``__getattr__``.

    Raises:
        AttributeError: no such name.
        ModuleNotFoundError: what it builds on is not installed; the message names the extra that brings it.
    """
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
    except ModuleNotFoundError as error:
        from flora import extras

        if (said := extras.explained(f"{package}.{name}", error)) is None:
            raise
        raise ModuleNotFoundError(said, name=error.name) from None
