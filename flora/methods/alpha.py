"""Alpha as a multiple of the rank: ``2r`` keeps alpha / r at 2 in every layer, whatever sets the layer's rank."""

import re
from collections.abc import Mapping
from typing import Any

KEYS = ("lora_alpha", "alpha")
_MULTIPLE = re.compile(r"(?P<factor>\d{1,4}(\.\d{0,4})?)?\s*r")


def multiple(settings: Mapping[str, Any]) -> tuple[str, float] | None:
    """The key of an alpha that is a multiple of the rank, and how often it takes the rank; None without one.

    Raises:
        ValueError: a text that is no multiple.
    """
    for key in KEYS:
        if isinstance(text := settings.get(key), str):
            match = _MULTIPLE.fullmatch(text.strip())
            if match is None:
                raise ValueError(f"adapter.{key} must be a number or a multiple of the rank (2r), got {text!r}")
            return key, float(match["factor"] or 1)
    return None


def resolved(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a method with alpha as a number, where one rank for all layers makes it one.

    Under a budget or patterns of ranks every layer has an alpha of its own, and the multiple stays. What is no multiple
    stays too: the method refuses it.
    """
    try:
        found = multiple(settings)
    except ValueError:
        found = None
    rank = settings.get("r")
    if found is None or type(rank) is not int or settings.get("budget") or settings.get("rank_pattern"):
        return dict(settings)
    return {**settings, found[0]: _times(found[1], rank)}


def follow_ranks(config: Any, key: str, factor: float) -> None:
    """Write alphas into a config of PEFT, once its ranks stand: ``factor`` times the rank, in all layers.

    Entries of ``alpha_pattern`` that are there already come first.
    """
    setattr(config, key, _times(factor, config.r))
    of_layers = {pattern: _times(factor, rank) for pattern, rank in (config.rank_pattern or {}).items()}
    if of_layers:
        config.alpha_pattern = {**config.alpha_pattern, **of_layers, **config.alpha_pattern}


def _times(factor: float, rank: int) -> int | float:
    product = factor * rank
    return int(product) if product.is_integer() else product
