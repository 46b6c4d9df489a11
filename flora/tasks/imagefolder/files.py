"""The splits that a folder of images has: folders of classes, or parquet files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from flora.contents import IMAGES, checksum, of
from flora.errors import DataError
from flora.tasks import manifest
from flora.tasks.imagefolder.dataset import Catalogue
from flora.tasks.images import parquet
from flora.tasks.images.decode import open_image

_NAMES = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
# Of a split: what opens each image, their labels, and their names for messages.
Part = tuple[list[Callable[[], Image.Image]], np.ndarray, list[str]]


def open_folder(
    folder: Path, classes: int | None, orientation: str = "exif"
) -> tuple[Catalogue, dict[str, np.ndarray], list[str], dict[str, Any]]:
    """All images, the rows of each split, the names of the classes, and facts of the files.

    Args:
        folder: with ``train``, and ``val`` or ``test``.
        classes: how many there must be; None: as many as there are.
        orientation: of the catalogue.

    Raises:
        DataError: a split is missing, or does not fit the others or ``classes``.
    """
    files = tables(folder)
    splits, names, facts = _parquet(folder, files, classes) if files["train"] else _tree(folder)
    if "train" not in splits or len(splits) == 1:
        raise DataError(f"{folder} needs train and val or test, as folders of classes or parquet files")
    if classes is not None and len(names) != classes:
        raise DataError(f"{folder} has {len(names)} classes, task.classes={classes}")
    if len(names) < 2:
        raise DataError(f"{folder} has one class, {names[0]}: there is nothing to tell apart")
    openers, labels, called = (list(chain(*parts)) for parts in zip(*splits.values(), strict=True))
    unreadable = torch.zeros(len(labels), dtype=torch.bool).share_memory_()
    catalogue = Catalogue(openers, np.array(labels, np.int64), called, unreadable, orientation)
    starts = np.cumsum([0, *(len(members) for members, _, _ in splits.values())])
    rows = {split: np.arange(*place) for split, place in zip(splits, pairwise(starts), strict=True)}
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
    sums = {split: checksum(_labelled(place, _classes(place)), place) for split, place in places.items()}
    empty = [name for name in _classes(places["train"]) if not _images(places["train"] / name)] if sums else []
    return sums | ({"classes without images": "/".join(empty)} if empty else {})


def _places(folder: Path) -> dict[str, Path]:
    return {split: place for split, names in _NAMES.items() for name in names if (place := folder / name).is_dir()}


def _classes(place: Path) -> list[str]:
    return sorted(p.name for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))


def _labelled(place: Path, classes: list[str]) -> dict[Path, int]:
    """The images of a split, each with its label."""
    return {file: label for label, name in enumerate(classes) for file in _images(place / name)}


def _tree(folder: Path) -> tuple[dict[str, Part], list[str], dict[str, Any]]:
    """Splits that are folders of class folders."""
    places = _places(folder)
    classes_of = {split: _classes(place) for split, place in places.items()}
    names = classes_of.get("train", [])
    splits, sums = {}, {}
    for split, place in places.items():
        if unknown := sorted(set(classes_of[split]) - set(names)):
            raise DataError(f"{place}: class {unknown[0]} is not in train; check that both are of the same dataset")
        files = _labelled(place, names)
        if not files:
            raise DataError(f"{place} holds no folders with images ({', '.join(IMAGES)})")
        sums[split] = checksum(files, place)
        openers: list[Callable[[], Image.Image]] = [partial(open_image, file) for file in files]
        splits[split] = openers, np.array(list(files.values()), np.int64), list(map(str, files))
    return splits, names, {"sha256": sums}


def _images(folder: Path) -> list[Path]:
    files = folder.rglob("*") if folder.is_dir() else ()
    return sorted(file for file in files if file.suffix.lower() in IMAGES and file.is_file())


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
