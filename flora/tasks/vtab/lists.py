"""VTAB-1K's official draws: a folder with train800.txt, val200.txt and test.txt, one ``PATH LABEL`` a line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flora.contents import checksum, digests
from flora.errors import DataError
from flora.models.weights import sha256_of
from flora.tasks import manifest
from flora.tasks.images.decode import Pool, open_image

FILES = {"train": "train800.txt", "validation": "val200.txt", "test": "test.txt"}


def in_folder(folder: Path) -> bool:
    """Whether a folder holds official lists."""
    return (folder / FILES["train"]).is_file()


def open_folder(folder: Path, classes: int) -> tuple[dict[str, Pool], list[str], dict[str, Any]]:
    """Pools of the three lists, class names, and facts on the source; labels lie in ``0..classes-1``.

    Raises:
        DataError: a list is missing, empty, has changed, or holds a line that does not fit.
    """
    manifest.check(folder, [folder / name for name in FILES.values()])
    pools, files = {}, {}
    for split, name in FILES.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{folder}: no {name} beside the other official lists; fetch it again")
        pools[split], images = _pool(path, classes)
        sums = {"sha256": sha256_of(path), "images_sha256": checksum(images, folder)}
        files[name] = {"rows": len(pools[split])} | sums
    names = [str(index) for index in range(classes)]
    return pools, names, {"source": "paths.data, official lists", "files": files}


def contents(folder: Path) -> dict[str, str]:
    """What decides the three splits, as ``Task.contents``: checksums of the lists, and of the images of each."""
    sums = digests([folder / name for name in FILES.values()], folder)
    for name in FILES.values():
        if not (path := folder / name).is_file():
            raise DataError(f"{folder}: no {name} beside the other official lists; fetch it again")
        sums[f"{name} images"] = checksum([folder / line.rpartition(" ")[0] for line in _lines(path)], folder)
    return sums


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from error


def _pool(path: Path, classes: int) -> tuple[Pool, list[Path]]:
    images, labels = [], []
    for number, line in enumerate(_lines(path), 1):
        name, _, label = line.rpartition(" ")
        if not name or not label.isdecimal() or int(label) >= classes:
            raise DataError(f"{path}, line {number}: {line!r} is not PATH LABEL with a label in 0..{classes - 1}")
        images.append(path.parent / name)
        labels.append(int(label))
    if not images:
        raise DataError(f"{path}: no lines; fetch it again")

    def open_rows(rows: np.ndarray) -> Iterator[Callable[[], Image.Image]]:
        for row in rows:
            yield partial(open_image, images[row])

    return Pool(np.array(labels, np.int64), open_rows, lambda row: f"{path}, line {row + 1}"), images
