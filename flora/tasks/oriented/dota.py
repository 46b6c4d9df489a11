"""DOTA's layout: SPLIT/images beside SPLIT/labelTxt with a text for each image; and its files of results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from flora import contents
from flora.errors import DataError, first_line
from flora.models import quads
from flora.tasks.base import Predicted
from flora.tasks.detect.files import divided
from flora.tasks.detect.objects import Annotated, Part
from flora.tasks.images.formats import open_image
from flora.tasks.oriented.objects import Oriented
from flora.tasks.portions import say

# In the order of DOTA_devkit; the last are of versions 1.5 and 2.0.
OFFICIAL = (
    *("plane", "baseball-diamond", "bridge", "ground-track-field", "small-vehicle", "large-vehicle", "ship"),
    *("tennis-court", "basketball-court", "storage-tank", "soccer-ball-field", "roundabout", "harbor"),
    *("swimming-pool", "helicopter", "container-crane", "airport", "helipad"),
)
_FOLDERS = {"train": "train", "validation": "val", "test": "test"}
_HEADERS = ("imagesource:", "gsd:")
_FIELDS = 10
_LINE = "x1 y1 x2 y2 x3 y3 x4 y4 category difficult"
_PIXELS = 1 << 30  # DOTA's images have up to 29,200 x 27,620; Pillow takes more than 179 million for an attack
Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or _PIXELS, _PIXELS)


class Pair(NamedTuple):
    """An image and its labels."""

    image: Path
    labels: Path


class _Line(NamedTuple):
    corners: list[float]
    category: str
    difficult: bool


def pairs(folder: Path, missing: str = "error") -> dict[str, list[Pair]]:
    """The images of each split with their labels, by name; without a test, as DOTA's has no public labels.

    Args:
        folder: of the data set.
        missing: ``error``, or ``skip`` to leave out labels whose image is not there.

    Raises:
        DataError: there is no such folder or split, or images and labels are not of each other.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}: set paths.data, and task.dataset to a folder in it")
    places = {split: folder / name for split, name in _FOLDERS.items() if (folder / name / "labelTxt").is_dir()}
    if "train" not in places or len(places) < 2:
        raise DataError(
            f"{folder} has no {'train' if 'train' not in places else 'val'}/labelTxt: DOTA's layout has train and val, "
            "each with the folders images and labelTxt"
        )
    return {split: _paired(place, missing) for split, place in places.items()}


def _paired(place: Path, missing: str) -> list[Pair]:
    images = [path for path in sorted((place / "images").glob("*")) if path.suffix.lower() in contents.IMAGES]
    if not images:
        raise DataError(f"{place / 'images'} has no images: unpack them there")
    stems = {image.stem: image for image in images}
    if twice := next((image for image in images if stems[image.stem] != image), None):
        raise DataError(
            f"{twice} and {stems[twice.stem].name} have the same labels {twice.stem}.txt: leave one of them"
        )
    labels = {path.stem: path for path in sorted((place / "labelTxt").glob("*.txt"))}
    lacking = [image for image in images if image.stem not in labels]
    if len(lacking) == len(images):
        raise DataError(f"{place / 'labelTxt'} is of another set: none of its {len(labels)} files is of an image")
    if lacking:
        raise DataError(
            f"{place}: {len(lacking)} of {len(images)} images have no labels (first {lacking[0].name}): add "
            f"labelTxt/{lacking[0].stem}.txt, empty where it shows no object"
        )
    absent = sorted({*labels} - {*stems})
    if absent and missing != "skip":
        raise DataError(
            f"{place}: the images of {len(absent)} files in labelTxt are not there (first {absent[0]}.txt); fetch them "
            "or set task.unreadable=skip"
        )
    return [Pair(image, labels[image.stem]) for image in images]


def open_folder(
    folder: Path, held_out: float, seed: int, missing: str
) -> tuple[Annotated, dict[str, np.ndarray], dict[str, Any]]:
    """All images, the rows of the three splits, and facts of the files; see ``flora.tasks.detect.files.open_folder``.

    The classes are those of train, in DOTA's order where they are DOTA's, else by their names. Outlines that cross
    themselves get their corners in another order, and are counted in ``warnings``.

    Raises:
        DataError: as of ``pairs``; an image or a label that cannot be used, by file and line.
    """
    there = pairs(folder, missing)
    lines = {split: [_lines(pair.labels) for pair in members] for split, members in there.items()}
    names = {line.category for objects in lines["train"] for line in objects}
    order = OFFICIAL if names <= {*OFFICIAL} else sorted(names)
    class_names = [name for name in order if name in names]
    parts, broken, warnings = dict[str, Part](), list[bool](), list[str]()
    for split, members in there.items():
        sizes, unread = _sizes([pair.image for pair in members], missing)
        part, crossed = _part(members, lines[split], class_names, sizes, unread)
        if crossed:
            warnings.append(
                f"{members[0].labels.parent}: the outlines of {len(crossed)} objects cross themselves (first "
                f"{crossed[0]}): their corners are taken in another order"
            )
            say(f"warning: {warnings[-1]}")
        parts[split] = part
        broken += unread
    annotated, rows, said = divided(folder, parts, class_names, held_out, seed)
    annotated.unreadable[:] = annotated.unreadable.new_tensor(broken)
    files = {str(members[0].labels.parent.relative_to(folder)): {"rows": len(members)} for members in there.values()}
    return annotated, rows, {"source": "paths.data", "files": files, "warnings": warnings, **said}


def _lines(path: Path) -> list[_Line]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable text ({first_line(error)}); fetch it again") from error
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.strip().lower().startswith(_HEADERS):
            continue
        fields = line.split()
        where = f"{path}, line {number}"
        if len(fields) != _FIELDS:
            raise DataError(f"{where}: it has {len(fields)} fields, not the {_FIELDS} of {_LINE}: mend it")
        try:
            corners, difficult = [float(field) for field in fields[:8]], int(fields[9])
        except ValueError as error:
            raise DataError(f"{where}: {first_line(error)}; it must be {_LINE}") from error
        if not all(map(math.isfinite, corners)) or difficult < 0:
            raise DataError(f"{where}: {line.strip()!r} has a number that cannot be: it must be {_LINE}")
        found.append(_Line(corners, fields[8], difficult > 0))
    return found


def _sizes(images: Sequence[Path], missing: str) -> tuple[np.ndarray, list[bool]]:
    """Height and width of images ``[M, 2]``, and which cannot be read, of which these are 1."""

    def size(path: Path) -> tuple[int, int] | str:
        try:
            with open_image(path) as image:
                return image.height, image.width
        except Exception as error:  # Pillow raises almost any type on broken bytes
            return first_line(error)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(size, images))
    broken = [isinstance(one, str) for one in found]
    if any(broken) and missing != "skip":
        at = broken.index(True)
        raise DataError(
            f"{images[at]}: image cannot be decoded ({found[at]}); mend it or set task.unreadable=skip "
            f"({sum(broken)} such images)"
        )
    return np.array([(1, 1) if isinstance(one, str) else one for one in found], np.int64), broken


def _part(
    members: Sequence[Pair],
    lines: Sequence[Sequence[_Line]],
    class_names: Sequence[str],
    sizes: np.ndarray,
    broken: Sequence[bool],
) -> tuple[Part, list[str]]:
    """Images with their objects, and the files of labels of those whose outlines crossed themselves."""
    index = {name: number for number, name in enumerate(class_names)}
    for pair, objects, (height, width), unread in zip(members, lines, sizes.tolist(), broken, strict=True):
        for line in objects:
            if line.category not in index:
                raise DataError(f"{pair.labels}: class {line.category} is unknown; train has {', '.join(class_names)}")
            if not unread:
                _check_inside(pair, line.corners, width, height)
    counts = [0 if unread else len(objects) for objects, unread in zip(lines, broken, strict=True)]
    kept = [line for objects, unread in zip(lines, broken, strict=True) if not unread for line in objects]
    corners, crossed = quads.uncrossed(
        torch.tensor([line.corners for line in kept], dtype=torch.float64).reshape(-1, 4, 2)
    )
    owner = np.repeat(np.arange(len(members)), counts)
    part = Part(
        [partial(open_image, pair.image) for pair in members],
        [str(pair.image) for pair in members],
        sizes,
        Oriented(
            corners.numpy(),
            np.array([index[line.category] for line in kept], np.int64),
            np.array([line.difficult for line in kept], bool),
            np.cumsum([0, *counts]),
        ),
    )
    return part, [members[image].labels.name for image in owner[crossed.numpy()].tolist()]


def _check_inside(pair: Pair, corners: Sequence[float], width: int, height: int) -> None:
    """Objects at the edge may reach out, as DOTA's do; one whose middle does is of another image."""
    x, y = np.array(corners).reshape(4, 2).T
    if not (0 <= (x.min() + x.max()) / 2 <= width and 0 <= (y.min() + y.max()) / 2 <= height):
        numbers = " ".join(f"{number:g}" for number in corners)
        raise DataError(
            f"{pair.labels}: the object at {numbers} is not inside the image of {width} x {height} pixels: mend the "
            "labels, or they are of another set"
        )


class Results:
    """What is found, as DOTA's task 1 takes it: a file ``Task1_CLASS.txt`` of each class, also of one never found.

    A line is the image's name without suffix, the score, and x and y of four corners.

    Args:
        class_names: all.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self._lines: dict[str, list[str]] = {name: [] for name in class_names}

    def noted(self, one: Predicted) -> Predicted:
        """The image, once its objects are taken down."""
        image = "_".join(one.name.split())  # spaces separate the fields
        for found in one.said.objects:
            numbers = (found.score, *(number for corner in found.corners for number in corner))
            self._lines[found.label].append(" ".join([image, *(f"{number:.9g}" for number in numbers)]) + "\n")
        return one

    def write(self, folder: Path) -> None:
        """Write the files to a new folder."""
        folder.mkdir()
        for name, lines in self._lines.items():
            safe = name.replace("%", "%25").replace("/", "%2F")  # no other name gives the same
            (folder / f"Task1_{safe}.txt").write_text("".join(lines), encoding="utf-8")
