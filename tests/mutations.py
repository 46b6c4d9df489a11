"""Ways to spoil a file: its bytes, what a JSON or YAML file says, its tensors, or that it is a file at all."""

import copy
import json
import os
import random
import shutil
from pathlib import Path

import torch
import yaml
from safetensors.torch import load, save

ODD = [
    *(None, True, False, 0, -1, 10**30, 1e308, -0.5, "", " ", "nan", [], {}, [1], [None], {"a": 1}, "x" * 5000, "\n"),
    *("../../escape", "/escape", "~/escape", "nul\0byte", "\u202eevil", "$\\frac{", "${oc.env:NO}", "=1+1", "\ud800"),
    *(float("nan"), float("inf"), [[]], {"_target_": "os.system", "_args_": ["touch escape"]}, "finished", [{"a": []}]),
]
CONTENTS = [
    *(b"", b"[]", b"{}", b"null", b"1", b'"x"', b"[[[[" * 20000, b"\xff\xfe\x00", b"\xef\xbb\xbf{}", b"NaN", b"{]"),
    *(
        b"1e999",
        b"!!python/object/apply:os.system ['touch escape']",
        b"&a [*a]",
        b"\x80\x04K\x01.",
        b"a: b: c",
        b"\0" * 99,
    ),
]
NAMES = [
    "[1]",
    "x (conflicted copy)",
    "\udcff",
    ".hidden",
    "a\nb",
    "$x$",
    "../escape".replace("/", "\u2044"),
    "x" * 240,
]


def damaged(content, chance):
    """A file's bytes with flipped bits, cut short, with a piece twice, zeroed or put elsewhere."""
    data = bytearray(content)
    if not data:
        return b"\0"
    how = chance.choice(("flip", "flip", "flip", "cut", "double", "zero", "swap", "head", "length"))
    at = chance.randrange(len(data))
    size = chance.randrange(1, 64)
    if how == "flip":
        for _ in range(chance.choice((1, 1, 3, 20))):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how == "double":
        data[at:at] = data[at : at + size]
    elif how == "zero":
        data[at : at + size] = bytes(len(data[at : at + size]))
    elif how == "swap":
        data[at : at + size], data[:size] = data[:size], data[at : at + size]
    elif how == "head":
        data[: min(64, len(data))] = chance.randbytes(min(64, len(data)))
    else:
        data[:8] = chance.choice((0, 1, 2**31, 2**63 - 1, 2**64 - 1)).to_bytes(8, "little")
    return bytes(data)


def restated(node, chance):
    """A JSON value with one to three of its parts changed, dropped, doubled or added; and what was done, in words."""
    node, said = {"": copy.deepcopy(node)}, []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        spots = _spots(node)
        place, key = chance.choice(spots[1:] or spots)
        how = chance.choice(("change", "change", "change", "drop", "add"))
        value = copy.deepcopy(chance.choice(ODD))
        if how == "add" and isinstance(place, dict) and place is not node:
            place[f"{key}_"] = value
        elif how == "drop" and place is not node:
            del place[key]
        else:
            place[key] = value
        said.append(f"{how} {key!r:.30} {value!r:.40}")
    return node[""], "; ".join(said)


def _spots(node):
    found = []
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        found += [(node, key)] + (_spots(value) if isinstance(value, dict | list) else [])
    return found


def retensored(content, chance):
    """Tensors of which one is gone, new, not finite, or of another shape or type; and what was done, in words."""
    tensors = load(content)
    name = chance.choice(sorted(n for n, t in tensors.items() if t.is_floating_point()) or sorted(tensors))
    tensor = tensors.pop(name)
    changes = {
        "dropped": lambda: {},
        "renamed": lambda: {f"{name}_": tensor},
        "int8": lambda: {name: tensor.to(torch.int8)},
        "bool": lambda: {name: tensor.bool()},
        "cut": lambda: {name: tensor[:1].clone() if tensor.ndim and len(tensor) > 1 else tensor[None]},
        "nan": lambda: {name: torch.full_like(tensor.float(), torch.nan)},
        "inf": lambda: {name: torch.full_like(tensor.float(), torch.inf)},
        "half of them dropped": lambda: tensors.clear() or {name: tensor} if len(tensors) > 1 else {},
    }
    how = chance.choice(list(changes))
    changed = changes[how]()
    return save({**tensors, **changed}, {"format": "pt"}), f"{name} {how}"


def spoil(path: Path, chance: random.Random) -> tuple[str, bool]:
    """Spoil a file; returns what was done, in words, and whether it holds no tensors of its kind any more."""
    ways = ["bytes", "bytes", "bytes", "content", "kind", "beside"]
    ways += {".json": ["json"] * 8, ".yaml": ["yaml"] * 8, ".safetensors": ["tensors"] * 6}.get(path.suffix, [])
    way = chance.choice(ways)
    if path.suffix == ".lock":
        way = chance.choice(("json", way))
    if way == "bytes":
        path.write_bytes(damaged(path.read_bytes(), chance))
    elif way == "content":
        content = chance.choice(CONTENTS)
        path.write_bytes(content)
        return f"{path}: is {content!r:.40}", False
    elif way == "json":
        changed, said = restated(json.loads(path.read_bytes()), chance)
        path.write_text(json.dumps(changed))
        return f"{path}: {said}", False
    elif way == "yaml":
        changed, said = restated(yaml.safe_load(path.read_bytes()), chance)
        head = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
        path.write_text(head + ("" if chance.random() < 0.9 else "!!odd ") + yaml.safe_dump(changed))
        return f"{path}: {said}", False
    elif way == "tensors":
        changed, said = retensored(path.read_bytes(), chance)
        path.write_bytes(changed)
        return f"{path}: {said}", True
    else:
        place = path
        if way == "beside":
            place = path.with_name(f"{chance.choice(NAMES)}{path.suffix}")
        else:
            path.unlink()
        kind = chance.choice(("folder", "dangling", "loop", "pipe", "copy" if way == "beside" else "gone", "empty"))
        if kind == "folder":
            place.mkdir()
        elif kind in ("dangling", "loop"):
            place.symlink_to("nowhere" if kind == "dangling" else place.name)
        elif kind == "pipe":
            os.mkfifo(place)
        elif kind == "copy":
            shutil.copyfile(path, place)
        elif kind == "empty":
            place.touch()
        return f"{os.fsencode(place)!r}: {kind}", False
    return f"{path}: bytes", False
