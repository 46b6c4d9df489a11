"""VTAB's sets that no server offers to a program, read as their publishers pack them.

| set | files in its folder |
|---|---|
| resisc45 | ``CLASS/*.jpg``, 45 folders of 700, perhaps inside ``NWPU-RESISC45`` |
| diabetic_retinopathy | Kaggle's ``trainLabels.csv``, ``train/*.jpeg``, ``test/*.jpeg``; ``retinopathy_solution.csv`` |
| dmlab | ``dmlab-{train,validation,test}.tfrecord*`` of VTAB's dmlab.tar.gz |
| smallnorb_azimuth, smallnorb_elevation | ``smallnorb-*-{training,testing}-{dat,info}.mat``, perhaps as ``.gz`` |
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from flora.errors import DataError, first_line
from flora.tasks.base import draw
from flora.tasks.images.decode import Pool
from flora.tasks.images.formats import open_image
from flora.tasks.vtab import retina, tfrecord

# Images of each part, as tensorflow_datasets counts them (of smallNORB's test, half is VTAB's validation).
COUNTS = {
    "kitti": {"train": 6347, "validation": 423, "test": 711},
    "resisc45": {"train": 31500},
    "diabetic_retinopathy": {"train": 35126, "validation": 10906, "test": 42670},
    "dmlab": {"train": 65550, "validation": 22628, "test": 22735},
    "smallnorb_azimuth": {"train": 24300, "validation": 12150, "test": 12150},
    "smallnorb_elevation": {"train": 24300, "validation": 12150, "test": 12150},
}
_BYTES, _INTEGERS = 0x1E3D4C55, 0x1E3D4C54  # smallNORB's kinds of matrix
Read = tuple[dict[str, Pool], list[str]]


def read(dataset: str, folder: Path) -> Read | None:
    """Pools and class names of a folder as it is published; None where the folder holds something else.

    Raises:
        DataError: some of its files are missing or cannot be read.
    """
    reader = _READERS.get(dataset)
    try:
        return reader(folder) if reader else None
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: {first_line(error)}") from error


def miscounted(dataset: str, pools: dict[str, Pool]) -> list[str]:
    """What the parts hold and should not, in words."""
    official = COUNTS.get(dataset, {})
    sizes = {part: len(pools.get(part, ())) for part in official}
    return [f"{part}: {sizes[part]} images, officially {n}" for part, n in official.items() if sizes[part] != n]


def _resisc45(folder: Path) -> Read | None:
    root = folder / "NWPU-RESISC45" if (folder / "NWPU-RESISC45").is_dir() else folder
    classes = sorted(place.name for place in root.iterdir() if place.is_dir() and any(place.glob("*.jpg")))
    if not classes:
        return None
    if len(classes) != 45:
        raise DataError(f"{root}: {len(classes)} folders of images, RESISC45 has 45 classes")
    files = [(path, label) for label, name in enumerate(classes) for path in sorted((root / name).glob("*.jpg"))]
    return {"train": _of_files(files, open_image)}, classes


def _diabetic_retinopathy(folder: Path) -> Read | None:
    train, solution = folder / "trainLabels.csv", folder / "retinopathy_solution.csv"
    if not train.is_file():
        return None
    if not solution.is_file():
        raise DataError(f"no {solution.name} beside {train.name}: it has the labels of test")
    rated = [("train", row) for row in _rows(train)]
    rated += [("validation" if row["Usage"] == "Public" else "test", row) for row in _rows(solution)]
    files: dict[str, list[tuple[Path, int]]] = {"train": [], "validation": [], "test": []}
    for split, row in rated:
        path = folder / ("train" if split == "train" else "test") / f"{row['image']}.jpeg"
        if not path.is_file():
            raise DataError(f"there is no {path.relative_to(folder)}, which the labels name")
        files[split].append((path, _checked(int(row["level"]), 5)))
    names = ["no", "mild", "moderate", "severe", "proliferative"]
    return {split: _of_files(members, _retina) for split, members in files.items()}, names


def _dmlab(folder: Path) -> Read | None:
    splits = {split: sorted(folder.glob(f"dmlab-{split}.tfrecord*")) for split in ("train", "validation", "test")}
    if not any(splits.values()):
        return None
    if missing := [split for split, paths in splits.items() if not paths]:
        raise DataError(f"no dmlab-{missing[0]}.tfrecord* beside the others")
    pools = {}
    for split, paths in splits.items():
        places, labels = [], []
        for path in paths:
            for place, content in tfrecord.records(path):
                places.append((path, place, len(content)))
                labels.append(_checked(int(tfrecord.example(content)["label"]), 6))
        pools[split] = _pool(labels, [partial(_of_record, *place) for place in places], [p.name for p, *_ in places])
    return pools, [str(label) for label in range(6)]


def _smallnorb(folder: Path, column: int, step: int, classes: int) -> Read | None:
    if not any(folder.glob("smallnorb-*.mat*")):
        return None
    pools = {}
    for split, part in {"train": "training", "test": "testing"}.items():
        images, facts = _matrix(folder, f"{part}-dat", _BYTES), _matrix(folder, f"{part}-info", _INTEGERS)
        labels = [_checked(int(value), classes) for value in facts[:, column] // step]
        left = images[:, 0]  # of the two cameras, as tensorflow_datasets' feature "image"
        rows = np.arange(len(left))
        for name, chosen in _halves(rows) if split == "test" else [("train", rows)]:
            openers = [partial(Image.fromarray, left[row]) for row in chosen]
            where = [f"smallnorb {part}, image {row}" for row in chosen]
            pools[name] = _pool([labels[row] for row in chosen], openers, where)
    return pools, [str(step * label) for label in range(classes)]


def _halves(rows: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """VTAB halves the test set in the order of its own files, which is not published: ours is drawn, with seed 0."""
    validation, test = np.split(draw(len(rows), 0), [len(rows) // 2])
    return [("validation", np.sort(validation)), ("test", np.sort(test))]


def _matrix(folder: Path, part: str, kind: int) -> np.ndarray:
    """A matrix of smallNORB: kind, number of dimensions, then at least three sizes, all int32, then the values."""
    path = next(iter(sorted(folder.glob(f"smallnorb-*-{part}.mat*"))), None)
    if path is None:
        raise DataError(f"no smallnorb-*-{part}.mat beside the others")
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
        found, dimensions = np.frombuffer(stream.read(8), "<i4")
        sizes = np.frombuffer(stream.read(4 * max(3, dimensions)), "<i4")[:dimensions]
        values = np.frombuffer(stream.read(), np.uint8 if kind == _BYTES else "<i4")
    if found != kind or len(values) != np.prod(sizes):
        raise DataError(f"{path.name} is not the matrix of smallNORB that its name says, or breaks off")
    return values.reshape(sizes)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _checked(label: int, classes: int) -> int:
    if not 0 <= label < classes:
        raise ValueError(f"label {label} is outside 0..{classes - 1}")
    return label


def _of_files(files: Sequence[tuple[Path, int]], opened: Callable[[Path], Image.Image]) -> Pool:
    openers = [partial(opened, path) for path, _ in files]
    return _pool([label for _, label in files], openers, [str(path) for path, _ in files])


def _retina(path: Path) -> Image.Image:
    with open_image(path) as image:
        return retina.processed(image)


def _of_record(path: Path, place: int, length: int) -> Image.Image:
    image = tfrecord.example(tfrecord.record_at(path, place, length))["image"]
    return Image.open(io.BytesIO(image if isinstance(image, bytes) else b""))


def _pool(labels: Sequence[int], openers: Sequence[Callable[[], Image.Image]], where: Sequence[str]) -> Pool:
    def open_rows(rows: np.ndarray) -> Iterator[Callable[[], Image.Image]]:
        for row in rows:
            yield openers[row]

    return Pool(np.asarray(labels, np.int64), open_rows, lambda row: where[row])


_READERS: dict[str, Callable[[Path], Read | None]] = {
    "resisc45": _resisc45,
    "diabetic_retinopathy": _diabetic_retinopathy,
    "dmlab": _dmlab,
    "smallnorb_azimuth": partial(_smallnorb, column=2, step=2, classes=18),
    "smallnorb_elevation": partial(_smallnorb, column=1, step=1, classes=9),
}
