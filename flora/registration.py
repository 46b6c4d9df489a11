"""Registers our methods with PEFT when PEFT is imported, by whomever."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

METHODS = ("flora.adapters", "flora.methods.rivals")  # importing them writes their methods into PEFT's tables


class _AfterPeft(MetaPathFinder):
    """Finds PEFT as Python does, and has our methods imported when PEFT has been."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == "peft" else None
        if spec is None or spec.loader is None:
            return None  # other finders go on
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            _register()

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def when_peft_is_imported() -> None:
    """Register now if PEFT is imported, else as soon as it is."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())


def _register() -> None:
    for name in METHODS:
        importlib.import_module(name)
