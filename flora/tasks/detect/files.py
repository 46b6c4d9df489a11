"""The splits that a folder of annotated images has: parquet files, or COCO's annotation files with folders."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from flora.errors import DataError
from flora.tasks import manifest
from flora.tasks.base import draw
from flora.tasks.detect import coco, parquet
from flora.tasks.detect.objects import Annotated, Part
from flora.tasks.portions import AS_FILES, SPLITS

_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


def tables(folder: Path) -> dict[str, list[Path]]:
    """The annotation files of each split, perhaps none; DataError where there is no folder or nothing to train on."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}: set paths.data, and task.dataset to a folder in it")
    for place, pattern in ((folder, "{}*.parquet"), (folder / "annotations", f"{coco.PREFIX}{{}}*.json")):
        found = {
            split: sorted({path for name in names for path in place.glob(pattern.format(name))})
            for split, names in _NAMES.items()
        }
        if found["train"]:
            if not found["validation"] and not found["test"]:
                raise DataError(f"{folder} has train alone: add a validation or a test")
            return found
    raise DataError(
        f"{folder} has neither train*.parquet nor annotations/{coco.PREFIX}train*.json: detection needs one of them"
    )


def open_folder(
    folder: Path, held_out: float, seed: int, missing: str
) -> tuple[Annotated, dict[str, np.ndarray], dict[str, Any]]:
    """All images, the rows of the three splits, and facts of the files.

    Without a test the validation is the test, and a part of train is held out to choose on; so it is without a
    validation.

    Args:
        folder: see ``tables``.
        held_out: that share of train.
        seed: of its draw.
        missing: of ``coco.read``.

    Raises:
        DataError: as of the readers, or where splits have other classes than train.
    """
    files = tables(folder)
    manifest.check(folder, [path for paths in files.values() for path in paths])
    parts: dict[str, Part] = {}
    names: dict[str, list[str]] = {}
    described: dict[str, Any] = {}
    for split, paths in files.items():
        if not paths:
            continue
        if len(paths) > 1 and paths[0].suffix == ".json":
            raise DataError(f"{folder} has {len(paths)} annotation files for {split}: leave one ({paths[0].name}, ...)")
        part, names[split], facts = coco.read(paths[0], missing) if paths[0].suffix == ".json" else parquet.read(paths)
        if not len(part):
            raise DataError(f"{paths[0]} has no images; fetch it again")
        if names[split] != names["train"]:
            raise DataError(f"{paths[0]}: class names or their order differ from train's; it is of another set")
        parts[split] = part
        described |= facts
    annotated, rows, said = divided(folder, parts, names["train"], held_out, seed)
    return annotated, rows, {"source": "paths.data", "files": described, **said}


def divided(
    folder: Path, parts: dict[str, Part], class_names: list[str], held_out: float, seed: int
) -> tuple[Annotated, dict[str, np.ndarray], dict[str, Any]]:
    """All images, the rows of the three splits, and how these were drawn and how many objects each has.

    Args:
        folder: for messages.
        parts: of the splits that there are, train and one more at least.
        class_names: in the order of class indices.
        held_out, seed: of ``open_folder``.

    Raises:
        DataError: a split has no images or shows no object.
    """
    starts = np.cumsum([0, *map(len, parts.values())])
    rows = {split: np.arange(*place) for split, place in zip(parts, pairwise(starts), strict=True)}
    rows, rule = _three(folder, rows, held_out, seed)
    annotated = Annotated.of(list(parts.values()), class_names)
    of = {split: int(sum(np.diff(annotated.objects.starts)[part])) for split, part in rows.items()}
    if empty := [split for split, count in of.items() if not count]:
        raise DataError(f"{folder}: no image of {empty[0]} shows an object; check the annotations")
    return annotated, rows, {"split_rule": rule, "objects": of}


def _three(folder: Path, rows: dict[str, np.ndarray], held_out: float, seed: int) -> tuple[dict[str, np.ndarray], str]:
    if len(rows) == len(SPLITS):
        return rows, AS_FILES
    train, test = rows["train"], rows["test" if "test" in rows else "validation"]
    order = draw(len(train), seed)
    count = round(held_out * len(order))
    if not 0 < count < len(order):
        raise DataError(f"{folder}: task.held_out={held_out} of {len(order)} images leaves a split empty")
    parts = {"train": train[np.sort(order[count:])], "validation": train[np.sort(order[:count])], "test": test}
    return parts, f"validation a drawn {held_out:.1%} of train, seed {seed}"


def lost(annotated: Annotated, images: np.ndarray) -> int:
    """How many of these images could not be decoded."""
    return int(annotated.unreadable.numpy()[images].sum())
