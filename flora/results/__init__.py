"""Records of runs: their schema, where they live, and what is made of them."""

from typing import Any

from flora import names

_HOMES = {"Record": "record", "Store": "store"}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    return names.public(__name__, _HOMES, name)
