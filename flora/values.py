"""Numbers as people type them: 1 where a constructor's annotation says float, and no text where it says number."""

from __future__ import annotations

import contextlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Union

from flora.errors import ConfigError

_NUMBERS = {int: "a whole number", float: "a number", bool: "true or false"}


def fitted(taker: Callable[..., Any], settings: Mapping[str, Any], group: str = "") -> dict[str, Any]:
    """Settings with numbers of the kinds that the annotations of their taker name, also in lists.

    Args:
        taker: a class or a function.
        settings: its keyword arguments.
        group: what messages put before a setting's name.

    Raises:
        ConfigError: something else where only a number, or true or false, may be.
    """
    known = _annotations(taker)
    return {
        key: _fitted(value, known[key], f"{group}.{key}".lstrip(".")) if key in known else value
        for key, value in settings.items()
    }


def with_floats(taker: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with floats where the annotations of their taker name them and an integer was given; nothing is refused.

    For classes of other libraries, whose annotations are narrower than what they take.
    """
    known = _annotations(taker)
    return {
        key: float(value) if type(value) is int and float in known.get(key, ()) and int not in known[key] else value
        for key, value in settings.items()
    }


@cache
def _annotations(taker: Callable[..., Any]) -> dict[str, tuple[Any, ...]]:
    """The kinds that each argument may be, by its annotation; of a class also what it hands on to its bases."""
    found: dict[str, tuple[Any, ...]] = {}
    for part in reversed(taker.__mro__) if isinstance(taker, type) else (taker,):
        own = inspect.unwrap(part.__dict__.get("__init__", object) if isinstance(part, type) else part)
        for key, hint in getattr(own, "__annotations__", {}).items():
            one: Any = types.SimpleNamespace(__annotations__={key: hint})
            with contextlib.suppress(NameError):  # a library's, which it imports for type checkers alone
                found[key] = _kinds(typing.get_type_hints(one, own.__globals__)[key])
    return found


def _kinds(hint: Any) -> tuple[Any, ...]:
    several = typing.get_origin(hint) in (Union, types.UnionType)
    return tuple(kind for part in typing.get_args(hint) for kind in _kinds(part)) if several else (hint,)


def _fitted(value: Any, kinds: tuple[Any, ...], name: str) -> Any:
    lists = [kind for kind in kinds if typing.get_origin(kind) in (list, tuple, Sequence)]
    if isinstance(value, list | tuple) and len(lists) == 1:
        return [_fitted(entry, _kinds(typing.get_args(lists[0])[0]), f"{name}.{i}") for i, entry in enumerate(value)]
    wanted = [kind for kind in kinds if kind is not type(None)]
    if (value is None and type(None) in kinds) or type(value) in wanted or not set(wanted) <= _NUMBERS.keys():
        return value
    if float in wanted and type(value) is int and abs(value) < 1e308:
        return float(value)
    if int in wanted and type(value) is float and value.is_integer():
        return int(value)
    raise ConfigError(f"{name} must be {' or '.join(_NUMBERS[kind] for kind in wanted)}, got {value!r}")
