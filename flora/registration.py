"""Registers our methods with PEFT when PEFT is imported, by whomever.

Every import of a module of ours imports ``flora`` first, and so comes by here before any that builds on PEFT. Threads
may import PEFT at once. The first imports of PEFT in one thread and of ``flora.adapters`` in another must not be, for
each holds a lock of Python's that the other waits for: Python then says "deadlock detected". Nor, with or without
flora, those of PEFT and of a module in it: PEFT imports itself in circles, and one of the threads may see half of it.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from packaging.version import Version

METHODS = ("flora.adapters", "flora.methods.rivals")  # importing them writes their methods into PEFT's tables
TESTED = ("0.21", "0.22")  # from the first, below the second; newer ones are probed


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
        ImportError: if PEFT is imported and older than what this needs, or lacks it; otherwise its import raises it.
    """
    if sys.modules.get("peft") is not None:
        _register(importlib.import_module("peft"))  # which waits where another thread is importing it
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())


def is_newer(peft: ModuleType) -> bool:
    """Whether PEFT is newer than the series this was tested with.

    Raises:
        ImportError: if it is older: our modules build on what it does not have.
    """
    first, end = TESTED
    version = Version(Version(peft.__version__).base_version)
    if version < Version(first):
        raise ImportError(f"flora needs peft>={first}, found {peft.__version__}; install a newer version")
    return version >= Version(end)


def _register(peft: ModuleType) -> None:
    newer = is_newer(peft)
    try:
        for name in METHODS:
            importlib.import_module(name)
        changed = importlib.import_module("flora.replaced.interface").changes() if newer else []
    except (ImportError, AttributeError) as error:
        if not newer:
            raise
        changed = [str(error)]
    tested = f"flora was tested with peft>={TESTED[0]},<{TESTED[1]}"
    if changed:
        what = ", ".join(changed[:3])
        raise ImportError(
            f"{tested}; peft {peft.__version__} changed what it builds on ({what}); install one in that range"
        )
    if newer:
        warnings.warn(f"{tested}; peft {peft.__version__} has the same interfaces", stacklevel=2)
