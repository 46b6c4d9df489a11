"""The splits that a folder of images has: folders of classes, or parquet files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from flora.contents import IMAGES, NO_IMAGES, checksum, everything, of
from flora.errors import DataError
from flora.tasks import manifest
from flora.tasks.imagefolder.dataset import Catalogue
from flora.tasks.images import parquet
from flora.tasks.images.formats import open_image
from flora.tasks.portions import by_value, say

_NAMES = {"train": ("train",), "validation": ("validation", "val", "valid", "validate", "dev"), "test": ("test",)}
# Of a split: what opens each image, their labels, and their names for messages.
Part = tuple[list[Callable[[], Image.Image]], np.ndarray, list[str]]


def open_folder(
    folder: Path, classes: int | None, orientation: str = "exif", class_order: str = "name"
) -> tuple[Catalogue, dict[str, np.ndarray], list[str], dict[str, Any]]:
    """All images, the rows of each split, the names of the classes, and facts of the files.

    Args:
        folder: with ``train``, perhaps ``val`` and ``test``; or of classes, which all count as train.
        classes: how many there must be; None: as many as there are.
        orientation: of the catalogue.
        class_order: of folders: ``name``, or ``value`` where all are whole numbers.

    Raises:
        DataError: there is no training data, or a split does not fit the others or ``classes``.
    """
    files = tables(folder)
    in_order = by_value if class_order == "value" else sorted
    splits, names, facts = _parquet(folder, files, classes) if files["train"] else _tree(folder, in_order)
    if "train" not in splits:
        raise DataError(
            f"{folder} has no train beside {' and '.join(splits)}: add it, or leave only folders of classes"
        )
    if classes is not None and len(names) != classes:
        raise DataError(f"{folder} has {len(names)} classes, task.classes={classes}")
    if len(names) < 2:
        raise DataError(f"{folder} has one class, {names[0]}: there is nothing to tell apart")
    openers, labels, called = (list(chain(*parts)) for parts in zip(*splits.values(), strict=True))
    unreadable = torch.zeros(len(labels), dtype=torch.bool).share_memory_()
    catalogue = Catalogue(openers, np.array(labels, np.int64), called, unreadable, orientation)
    starts = np.cumsum([0, *(len(members) for members, _, _ in splits.values())])
    rows = {split: np.arange(*place) for split, place in zip(splits, pairwise(starts), strict=True)}
    untrained = np.setdiff1d(catalogue.labels, catalogue.labels[rows["train"]])
    if len(untrained):
        raise DataError(f"{folder}: class {names[untrained[0]]} has no image in train: add some, or remove the class")
    return catalogue, rows, names, {"source": "paths.data"} | facts


def tables(folder: Path) -> dict[str, list[Path]]:
    """The parquet files of each split; of train none where splits are folders. DataError where there is no folder."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}: set paths.data, and task.dataset to a folder in it")
    return {
        split: sorted({path for name in names for path in folder.rglob(f"{name}*.parquet")})
        for split, names in _NAMES.items()
    }


def contents(folder: Path) -> dict[str, str]:
    """What decides the splits of a folder, as ``Task.contents``: of folders of classes one checksum a split."""
    files = tables(folder)
    if files["train"]:
        return of(folder, [path for members in files.values() for path in members])
    places = _places(folder)
    sums = {
        split: checksum([file for name in _classes(place) for file in _images(place / name)], place)
        for split, place in places.items()
    }
    train = places.get("train", folder)
    empty = [name for name in sorted(_classes(train)) if not _images(train / name)]
    return sums | ({"classes without images": "/".join(empty)} if empty else {})


def _places(folder: Path) -> dict[str, Path]:
    """The folders of the splits; without any, the folder itself is train."""
    places = {split: place for split, names in _NAMES.items() for name in names if (place := folder / name).is_dir()}
    return places or {"train": folder}


def _classes(place: Path) -> list[str]:
    return [p.name for p in place.iterdir() if p.is_dir() and not p.name.startswith(".")]


def _tree(
    folder: Path, in_order: Callable[[Sequence[str]], list[str]]
) -> tuple[dict[str, Part], list[str], dict[str, Any]]:
    """Splits that are folders of class folders; without any, the folder itself is train."""
    places = _places(folder)
    classes_of = {split: _classes(place) for split, place in places.items()}
    names = in_order(classes_of.get("train", []))
    splits, sums = {}, {}
    for split, place in places.items():
        if "train" in places and (unknown := sorted(set(classes_of[split]) - set(names))):
            raise DataError(f"{place}: class {unknown[0]} is not in train; check that both are of the same dataset")
        files = [(file, label) for label, name in enumerate(names) for file in _images(place / name)]
        if not files and "train" in places:
            raise DataError(f"{place} holds no folders with images ({', '.join(IMAGES)})")
        seen = {label for _, label in files}
        empty = [name for label, name in enumerate(names) if label not in seen]
        if split == "train" and empty:
            raise DataError(f"{place / empty[0]} has no image, and would be a class: add some, or remove the folder")
        sums[split] = checksum([file for file, _ in files], place)
        openers: list[Callable[[], Image.Image]] = [partial(open_image, file) for file, _ in files]
        splits[split] = openers, np.array([label for _, label in files], np.int64), [str(file) for file, _ in files]
    return splits, names, {"sha256": sums}


def _images(folder: Path) -> list[Path]:
    return [file for file in everything(folder) if file.suffix.lower() in IMAGES]


def say_ignored(folder: Path) -> None:
    """Say which files of a folder are taken for no pictures, by their names, though nothing else either."""
    odd = [file for file in everything(folder) if file.suffix.lower() not in (*IMAGES, *NO_IMAGES)]
    if odd:
        ends = ", ".join(sorted({file.suffix.lower() or "no ending" for file in odd})[:5])
        say(f"{folder}: {len(odd)} files are not used, as their names end in none of {', '.join(IMAGES)} ({ends})")


def _parquet(
    folder: Path, files: dict[str, list[Path]], classes: int | None
) -> tuple[dict[str, Part], list[str], dict[str, Any]]:
    """Splits that are parquet files; their encoded images stay in memory."""
    everything = [path for members in files.values() for path in members]
    manifest.check(folder, everything)
    names = parquet.read_class_names(everything, classes)
    splits: dict[str, Part] = {}
    facts: dict[str, Any] = {}
    for split, members in files.items():
        if members:
            pool, described = parquet.open_pool(members, names)
            rows = np.arange(len(pool))
            splits[split] = list(pool.open_rows(rows)), pool.labels, [pool.where(int(row)) for row in rows]
            facts |= described
    return splits, names, {"files": facts}
