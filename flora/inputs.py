"""What identifies the data and the pretrained weights of a run: what they hold, wherever they lie."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

Inputs = dict[str, str]
"""Up to two sha256: ``data`` where files decide the data, ``weights`` where the network is pretrained."""


def of(data: Mapping[str, str], weights: Mapping[str, Any]) -> Inputs:
    """The inputs of a run.

    Args:
        data: as ``Task.contents`` gives it.
        weights: facts of the model (``ModelSpec.facts``), of which the checksums count.
    """
    parts = {"data": sorted(data.items()), "weights": sorted(_checksums(weights))}
    return {name: _sha256(part) for name, part in parts.items() if part}


def of_record(data: Mapping[str, Any], weights: Mapping[str, Any]) -> Inputs:
    """The inputs of a run whose record says of its data and weights what records of schema 1 do."""
    return of(dict(_recorded(data)), weights)


def difference(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    """What differs between the inputs of two runs, in words; nothing where they are the same."""
    return " and ".join(name for name in ("data", "weights") if one.get(name) != other.get(name))


def _checksums(facts: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, str]]:
    """Checksums by where they stand; of what has none, its repository on the hub."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _checksums(value, f"{place}/{key}")
        elif key == "sha256" or (key == "hub" and "sha256" not in facts):
            yield f"{place}/{key}", value


def _recorded(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    source = str(facts.get("source"))
    if source.startswith("torchvision"):
        yield "source", source
    elif source.startswith(("paths.data", "hub")):
        yield from _named({key: facts[key] for key in ("files", "images") if key in facts})
        yield from (facts.get("sha256") or {}).items()  # of folders of classes


def _named(node: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Checksums by the name of the file: splits may stand above the names."""
    for name, value in node.items():
        if not isinstance(value, Mapping):
            continue
        if "sha256" not in value:
            yield from _named(value)
            continue
        yield name, value["sha256"]
        if "images_sha256" in value:
            yield f"{name} images", value["images_sha256"]


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
