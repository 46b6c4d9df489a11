"""What identifies the data and the pretrained weights of a run: what they hold, wherever they lie.

What was found out is kept in FLORA_CACHE, with the state of all folders that were looked at: as long as that is the
same, a run is known without what trains, which takes seconds to import.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from flora import contents
from flora.files import cache_dir, read_object, write_json

_VERSION = 1  # bumped where the same files would give other inputs
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


def kept(asked: str, data: Path, places: Collection[str], find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``find`` gives, without calling it where it was called before and no file has changed since.

    Args:
        asked: names what is looked for.
        data: the folder of data sets.
        places: of files of the user's; where others are looked at, as in the hub's cache, nothing is kept.
        find: gives JSON.
    """
    own = [data.absolute(), *(Path(place).expanduser().absolute() for place in places)]
    key = _sha256([_VERSION, asked, [str(place) for place in own]])
    path = cache_dir() / "inputs" / f"{key[:16]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = read_object(path)
        if known["sha256"] == _sha256([known["seen"], known["found"]]) and all(
            contents.state(Path(place), deep)[0] == state for place, deep, state in known["seen"]
        ):
            return known["found"]
    with contents.noted() as folders:
        found = find()
    absolute = {folder.absolute(): deep for folder, deep in folders.items()}
    if not all(any(folder.is_relative_to(p if p.is_dir() else p.parent) for p in own) for folder in absolute):
        return found
    above = {p: False for folder in absolute for p in folder.parents if p.is_relative_to(own[0])}
    states = {
        place: (deep, *contents.state(place, deep)) for place, deep in ({own[0]: False} | above | absolute).items()
    }
    if max(newest for _, _, newest in states.values()) < time.time_ns() - contents.SETTLED_NS:
        seen = [[str(place), deep, state] for place, (deep, state, _) in states.items()]
        with contextlib.suppress(OSError):
            write_json(path, {"sha256": _sha256([seen, found]), "seen": seen, "found": found})
    return found


def _checksums(facts: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, str]]:
    """Checksums by where they stand; of what has none, its repository on the hub."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _checksums(value, f"{place}/{key}")
        elif value is not None and (key in ("sha256", "code_sha256") or (key == "hub" and "sha256" not in facts)):
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
