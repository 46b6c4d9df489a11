"""From encoded images to one uint8 tensor: opening, resizing, and what happens to an image that cannot be read."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from flora import memory, shared
from flora.errors import ConfigError, DataError, first_line
from flora.tasks.images.dataset import ImageDataset
from flora.tasks.images.formats import open_image

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
ORIENTATIONS = ("exif", "stored")  # Pillow itself turns TIFF, whatever is asked
_LONGEST = 1000  # times the short side: scaled by that one, a longer image takes more memory than a machine has
_CHUNK = 256


@dataclass(frozen=True)
class Pool:
    """Labelled images not decoded yet.

    Attributes:
        labels: int64 ``[N]``, class indices.
        open_rows: given ascending rows int64 ``[n]``, yields for each, in order, a function that opens its image. The
            function may raise anything if the image is broken.
        where: names a row for an error message, ``train.parquet, row 17``.
    """

    labels: np.ndarray
    open_rows: Callable[[np.ndarray], Iterator[Callable[[], Image.Image]]]
    where: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.labels)

    def without(self, rows: np.ndarray) -> Pool:
        """The pool without some rows, int64 ``[n]``."""
        kept = np.setdiff1d(np.arange(len(self)), rows)
        return Pool(self.labels[kept], lambda chosen: self.open_rows(kept[chosen]), lambda row: self.where(kept[row]))


def interpolation_mode(name: str) -> Image.Resampling:
    """Pillow's resampling filter of a name; ConfigError if there is none."""
    if name not in INTERPOLATIONS:
        raise ConfigError(f"interpolation {name!r} is unknown; choose one of {', '.join(INTERPOLATIONS)}")
    return INTERPOLATIONS[name]


@dataclass(frozen=True)
class Picture:
    """An image that is opened when it is asked for.

    Attributes:
        open: opens it; it may raise anything if the image is broken.
        name: for messages.
    """

    open: Callable[[], Image.Image]
    name: str


def as_picture(image: Any, number: int) -> Picture:
    """A path, an image of Pillow's, the bytes of a file, or a ``Picture``.

    Args:
        image: one of them.
        number: of it among others, for messages.

    Raises:
        ConfigError: it is something else.
        DataError: a path where no file is.
    """
    if isinstance(image, Picture):
        return image
    if isinstance(image, Image.Image):
        return Picture(image.copy, f"image {number}")
    if isinstance(image, bytes):
        return Picture(partial(open_image, image), f"image {number}")
    if isinstance(image, str | os.PathLike):
        path = Path(image).expanduser()
        if os.path.isdir(path):
            raise DataError(f"{image} is a folder: give its files as a list; mode=predict takes folders")
        if not os.path.exists(path):  # unlike a broken file it is never left out
            raise DataError(f"{image}: no such file")
        return Picture(partial(open_image, path), str(image))
    raise ConfigError(f"input {number} is {type(image).__name__}: give a path or an image of Pillow's")


def as_rgb(open_image: Callable[[], Image.Image], name: str, orientation: str = "exif") -> Image.Image:
    """A decoded image, turned as its EXIF says or as ``stored``; DataError with its name where it cannot be decoded."""
    try:
        with open_image() as image:
            if max(image.size) > _LONGEST * min(image.size):
                raise ValueError(f"{image.width} x {image.height} pixels are no picture")
            image.load()
            return _eight_bits(_upright(image) if orientation == "exif" else image).convert("RGB")
    # Pillow's decoders raise almost any type on broken bytes: OSError, SyntaxError, struct.error, zlib.error, ...
    except Exception as error:
        raise DataError(
            f"{name}: image cannot be decoded ({first_line(error)}); mend it or set task.unreadable=skip"
        ) from error


def _upright(image: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # Pillow raises almost any type on a broken EXIF; the pixels are whole
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image whose pixels fit into 0..255: Pillow's conversion would show all above as white."""
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of Pillow's mode {image.mode} have no fixed range: save it with 8 or 16 bits")
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def as_square(
    image: Image.Image, size: int, interpolation: str, how: str = "squash", fill: tuple[int, ...] = (0, 0, 0)
) -> np.ndarray:
    """An image as a square: uint8 ``[size, size, bands]``.

    ``squash`` gives the aspect ratio up, as VTAB does; ``crop`` keeps it and cuts the middle out of 8/7 of the size, as
    ImageNet's evaluation does; ``middle`` cuts it out of the size itself, as CLIP does; ``pad`` keeps the whole image
    in the middle of the colour ``fill``, as LLaVA does.
    """
    if how == "pad":
        side = max(image.size)
        square = Image.new(image.mode, (side, side), fill)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    if how in ("crop", "middle"):
        scale = size * (8 / 7 if how == "crop" else 1) / min(image.size)
        image = image.resize(
            (max(size, round(image.width * scale)), max(size, round(image.height * scale))),
            interpolation_mode(interpolation),
        )
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    if image.size != (size, size):
        image = image.resize((size, size), interpolation_mode(interpolation))
    return np.asarray(image).reshape(size, size, -1)


def decode(
    pool: Pool,
    rows: np.ndarray,
    *,
    image_size: int,
    interpolation: str,
    unreadable: str,
    resize: str = "squash",
    orientation: str = "exif",
    content: Callable[[], str | None] = lambda: None,
) -> tuple[ImageDataset, list[str]]:
    """Decode the given rows of a pool, in ascending order; once for all processes of a sweep, see ``flora.shared``.

    Args:
        pool: where they come from.
        rows: int64 ``[n]``.
        image_size: side in pixels.
        interpolation: a key of INTERPOLATIONS.
        unreadable: ``error``, or ``skip`` to leave out an image that cannot be decoded.
        resize: ``squash`` or ``crop``, see ``as_square``.
        orientation: one of ORIENTATIONS.
        content: names what the pool holds; None where nobody can say.

    Returns:
        The images, and where the ones left out lie.

    Raises:
        DataError: for an unreadable image under ``error``, or if nothing is left.
    """
    interpolation_mode(interpolation)
    _check_room(3 * len(rows), image_size)
    rows = np.sort(rows)

    def key() -> str | None:
        chosen = hashlib.sha256(rows.astype(np.int64).tobytes()).hexdigest()
        settings = [image_size, interpolation, unreadable, resize, orientation]
        return None if (held := content()) is None else json.dumps([held, chosen, *settings])

    def pixels(image: Image.Image) -> np.ndarray:
        return as_square(image, image_size, interpolation, resize).transpose(2, 0, 1)

    found = shared.once(key, lambda: _decoded(pool, rows, image_size, pixels, unreadable == "skip", orientation))
    kept = found["kept"]
    missed = [pool.where(int(row)) for row in rows[~kept]]
    return ImageDataset(torch.from_numpy(found["images"]), torch.from_numpy(pool.labels[rows][kept])), missed


def _decoded(
    pool: Pool,
    rows: np.ndarray,
    size: int,
    change: Callable[[Image.Image], np.ndarray],
    skip: bool,
    orientation: str,
) -> shared.Arrays:
    """``images`` uint8 ``[m, 3, size, size]``, and which rows they are, ``kept`` bool ``[n]``."""
    images = np.empty((len(rows), 3, size, size), np.uint8)

    def decode_one(position: int, open_image: Callable[[], Image.Image]) -> bool:
        try:
            rgb = as_rgb(open_image, pool.where(int(rows[position])), orientation)
        except DataError:
            if skip:
                return False
            raise
        images[position] = change(rgb)
        return True

    outcomes: list[bool] = []
    openers = pool.open_rows(rows)
    # Pillow frees the interpreter lock while it decodes. Chunks bound the encoded bytes held at a time.
    with ThreadPoolExecutor() as threads:
        while chunk := list(islice(openers, _CHUNK)):
            outcomes += threads.map(decode_one, range(len(outcomes), len(outcomes) + len(chunk)), chunk)
    kept = np.array(outcomes)
    if not kept.any():
        raise DataError(f"{pool.where(int(rows[0]))} and all others asked for: no image can be decoded")
    return {"images": images if kept.all() else images[kept], "kept": kept}


def from_grey(grey: np.ndarray, labels: np.ndarray, image_size: int, interpolation: str) -> ImageDataset:
    """A dataset of grey images uint8 ``[N, h, w]``, resized, their one channel shown as three."""
    interpolation_mode(interpolation)
    _check_room(len(grey), image_size)
    if grey.shape[1:] != (image_size, image_size):

        def key() -> str:
            return json.dumps([hashlib.sha256(grey.tobytes()).hexdigest(), grey.shape, image_size, interpolation])

        def resized() -> shared.Arrays:
            squares = (as_square(Image.fromarray(image), image_size, interpolation)[..., 0] for image in grey)
            whole = np.empty((len(grey), image_size, image_size), np.uint8)
            for target, square in zip(whole, squares, strict=True):
                target[:] = square
            return {"grey": whole}

        grey = shared.once(key, resized)["grey"]
    images = torch.from_numpy(grey)[:, None].expand(-1, 3, -1, -1)
    return ImageDataset(images, torch.from_numpy(labels.astype(np.int64)))


def _check_room(bands: int, size: int) -> None:
    """ConfigError where so many bands of so many pixels a side do not fit into memory."""
    memory.check(bands * size**2, f"images of {size} x {size} pixels", "lower model.image_size")


def stand_in(index: int, count: int, can_be_read: Callable[[int], bool]) -> list[int]:
    """The next of ``count`` examples that can be read, for a batch that would be empty without it.

    Images may be skipped, and a batch may be of one. A hundred are tried, then the list is empty.
    """
    tried = (following % count for following in range(index + 1, index + 101))
    return list(itertools.islice(filter(can_be_read, tried), 1))
