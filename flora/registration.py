"""Registers our methods with PEFT when PEFT is imported, by whomever.

Every import of a module of ours imports ``flora`` first, and so comes by here before any that builds on PEFT. Threads
may import PEFT at once. The first imports of PEFT in one thread and of ``flora.adapters`` in another must not be, for
each holds a lock of Python's that the other waits for: Python then says "deadlock detected".
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from packaging.version import Version

METHODS = ("flora.adapters", "flora.methods.rivals")  # importing them writes their methods into PEFT's tables
SUPPORTED = ("0.21", "0.22")


class _AfterPeft(MetaPathFinder):
    """Finds PEFT as the other finders do, and has our methods imported when PEFT has been."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "peft":
            return None  # the other finders go on
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            _register_after(spec.loader)
        return spec


def _register_after(loader: Any) -> None:
    """Have a loader of PEFT register our methods, once it is used: many only ask whether PEFT can be found."""
    load = loader.exec_module

    def load_and_register(module: ModuleType) -> None:
        del loader.exec_module  # the loader is as Python made it
        load(module)
        _register(module)

    loader.exec_module = load_and_register


def when_peft_is_imported() -> None:
    """Register now if PEFT is imported, else as soon as it is.

    Raises:
        ImportError: if PEFT is imported and not of the series this is tested with; otherwise its import raises it.
    """
    if sys.modules.get("peft") is not None:
        _register(importlib.import_module("peft"))  # which waits where another thread is importing it
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())


def check_version(peft: ModuleType) -> None:
    """Raise ImportError if PEFT is not of the series this is tested with: our modules build on its internals."""
    first, end = SUPPORTED
    if not Version(first) <= Version(Version(peft.__version__).base_version) < Version(end):
        raise ImportError(
            f"flora needs peft>={first},<{end}, found {peft.__version__}; install a version in that range"
        )


def _register(peft: ModuleType) -> None:
    check_version(peft)
    for name in METHODS:
        importlib.import_module(name)
