"""Images with their masks as files hold them: parquet of the hub, or ADE20K's official folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from flora.errors import DataError, first_line
from flora.tasks import manifest
from flora.tasks.images.formats import open_image
from flora.tasks.images.parquet import opener

_OFFICIAL = "ADEChallengeData2016"
_SPLITS = {"train": "training", "validation": "validation"}
_COLUMNS = ("image", "annotation")


class Scene(NamedTuple):
    """An image and its mask, not opened yet.

    Attributes:
        image, mask: open them; they may raise anything where a file is broken.
        name: for messages.
    """

    image: Callable[[], Image.Image]
    mask: Callable[[], Image.Image]
    name: str


def found(folder: Path) -> dict[str, list[Path]]:
    """The files of each split: tables, or else the images of ADE20K's official folder.

    Raises:
        DataError: neither is there.
    """
    tables = {split: sorted(folder.glob(f"{split}*.parquet")) for split in ("train", "validation", "test")}
    if tables["train"]:
        return {split: files for split, files in tables.items() if files}
    place = official(folder)
    images = {split: sorted((place / "images" / name).glob("*.jpg")) for split, name in _SPLITS.items()}
    if missing := [split for split, files in images.items() if not files]:
        raise DataError(
            f"{folder} has neither train*.parquet nor images/{_SPLITS[missing[0]]}/*.jpg: set paths.data to the folder "
            f"above, with columns image and annotation in the tables"
        )
    return images


def official(folder: Path) -> Path:
    """Where ADE20K's ``images`` and ``annotations`` lie, in a data set's folder."""
    return folder / _OFFICIAL if (folder / _OFFICIAL).is_dir() else folder


def masks(folder: Path) -> list[Path]:
    """The masks of ADE20K's official folder; none where the data are tables."""
    return sorted((official(folder) / "annotations").glob("*/*.png"))


def scenes(folder: Path) -> dict[str, list[Scene]]:
    """What each split holds, in the order of the files; the encoded images of tables stay in memory.

    Raises:
        DataError: files are missing, or no tables of images with masks.
    """
    files = found(folder)
    if files["train"][0].suffix == ".parquet":
        manifest.check(folder, [path for members in files.values() for path in members])
        return {split: [scene for path in members for scene in _rows(path)] for split, members in files.items()}
    there = {*masks(folder)}
    whole = {}
    for split, images in files.items():
        annotated = official(folder) / "annotations" / _SPLITS[split]
        pairs = [(image, annotated / f"{image.stem}.png") for image in images]
        if lacking := next((image for image, mask in pairs if mask not in there), None):
            raise DataError(f"{lacking} has no mask {annotated / lacking.stem}.png: unpack the data set again")
        whole[split] = [Scene(partial(open_image, i), partial(open_image, m), str(i)) for i, m in pairs]
    return whole


def _rows(path: Path) -> list[Scene]:
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        if missing := [name for name in _COLUMNS if schema.names.count(name) != 1]:
            raise DataError(
                f"{path}: no single column {' and '.join(missing)} (it has {', '.join(schema.names)}); a table of "
                "masks needs the columns image{bytes, path} and annotation{bytes, path}"
            )
        for name in _COLUMNS:
            kind = schema.field(name).type
            if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
                raise DataError(f"{path}: column {name} is {kind}; it must be a struct with the field bytes")
        rows = file.read(columns=list(_COLUMNS)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({first_line(error)}); fetch it again") from error
    if not rows:
        raise DataError(f"{path}: no rows; fetch the file again")
    cells = [[opener(path.parent, row[name] or {}) for name in _COLUMNS] for row in rows]
    return [Scene(image, mask, f"{path}, row {number}") for number, (image, mask) in enumerate(cells)]
