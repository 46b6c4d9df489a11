"""Images with the objects in them, as annotation files give them; all images of a data set in one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import hotcoco
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flora.errors import DataError, first_line

ROUNDING = 1.0  # pixels by which a box may lie outside its image: tools round in their own ways


@dataclass(frozen=True)
class Objects:
    """The objects of ``M`` images, ``N`` in all; those of image ``i`` are ``starts[i]`` to ``starts[i + 1]``.

    Attributes:
        boxes: float64 ``[N, 4]``, left, top, width and height in pixels, as the file has them.
        classes: int64 ``[N]``, indices from 0.
        crowds: bool ``[N]``, a group that was not divided: no training example, and neither found nor missed.
        areas: float64 ``[N]`` in square pixels, of the mask where there is one: what is small and what is large.
        masks: of each a list of polygons or a run-length encoding, as COCO's files have it; None: boxes alone.
        starts: int64 ``[M + 1]``.
    """

    boxes: np.ndarray
    classes: np.ndarray
    crowds: np.ndarray
    areas: np.ndarray
    masks: Sequence[Any] | None
    starts: np.ndarray

    def of(self, image: int) -> slice:
        """The objects of an image."""
        return slice(int(self.starts[image]), int(self.starts[image + 1]))

    def outlines(self, image: int) -> np.ndarray:
        """The corners of an image's objects, x and y, float64 ``[n, 4, 2]``."""
        x, y, w, h = self.boxes[self.of(image)].T
        return np.stack([x, y, x + w, y, x + w, y + h, x, y + h], axis=1).reshape(-1, 4, 2)

    @classmethod
    def joined(cls, of: Sequence[Objects]) -> Objects:
        """Objects of images after each other; with masks where all have them."""
        masks = None if any(objects.masks is None for objects in of) else [m for o in of for m in o.masks or ()]
        boxes, classes, crowds, areas = (
            np.concatenate([getattr(o, name) for o in of]) for name in ("boxes", "classes", "crowds", "areas")
        )
        return cls(boxes, classes, crowds, areas, masks, joined_starts([o.starts for o in of]))


@dataclass(frozen=True)
class Part:
    """The images of one split, not decoded yet.

    Attributes:
        openers: a function an image, that opens it; it may raise anything if the image is broken.
        names: of the images, for messages and pictures.
        sizes: int64 ``[M, 2]``, height and width in pixels, as annotated.
        objects: in them, ``Objects`` or what has its methods.
    """

    openers: list[Callable[[], Image.Image]]
    names: list[str]
    sizes: np.ndarray
    objects: Any

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Annotated:
    """All images of a data set, its splits after each other.

    Attributes:
        images: of all splits.
        class_names: in the order of class indices.
        unreadable: bool ``[M]``, which could not be decoded; in memory that worker processes share.
    """

    images: Part
    class_names: list[str]
    unreadable: Tensor

    @classmethod
    def of(cls, parts: Sequence[Part], class_names: list[str]) -> Annotated:
        """Splits, none of whose images has been opened."""
        images = joined(parts)
        return cls(images, class_names, torch.zeros(len(images), dtype=torch.bool).share_memory_())

    def __len__(self) -> int:
        return len(self.images)

    @property
    def objects(self) -> Any:
        """In all images."""
        return self.images.objects

    def skipped(self) -> list[str]:
        """Names of the images that could not be decoded, sorted."""
        return sorted(self.images.names[row] for row in self.unreadable.nonzero().flatten().tolist())


def joined(parts: Sequence[Part]) -> Part:
    """Parts after each other."""
    of = [part.objects for part in parts]
    return Part(
        [opener for part in parts for opener in part.openers],
        [name for part in parts for name in part.names],
        np.concatenate([part.sizes for part in parts]),
        type(of[0]).joined(of),
    )


def joined_starts(of: Sequence[np.ndarray]) -> np.ndarray:
    """Where the objects of each image start, of tables after each other; of each int64 ``[M + 1]``."""
    offsets = np.cumsum([0, *(starts[-1] for starts in of)])
    return np.concatenate([*(starts[:-1] + offset for starts, offset in zip(of, offsets, strict=False)), offsets[-1:]])


def checked(part: Part, file: str) -> Part:
    """A part whose boxes lie in their images; boxes without area are allowed, images without objects are as well.

    Raises:
        DataError: a box that does not, the first one by its image.
    """
    boxes, starts = part.objects.boxes, part.objects.starts
    image = np.repeat(np.arange(len(part)), np.diff(starts))
    height, width = part.sizes[image].T if len(image) else np.zeros((2, 0))
    x, y, w, h = boxes.T
    with np.errstate(invalid="ignore"):
        inside = (x >= -ROUNDING) & (y >= -ROUNDING) & (x + w <= width + ROUNDING) & (y + h <= height + ROUNDING)
        inside &= (w >= 0) & (h >= 0)
    wrong = np.flatnonzero(~inside)  # not finite is not inside
    if len(wrong):
        at = int(wrong[0])
        which = part.names[image[at]]
        box = ", ".join(f"{number:g}" for number in boxes[at])
        raise DataError(
            f"{file}: {which}: box [{box}] (left, top, width, height) is not inside the image of "
            f"{int(width[at])} x {int(height[at])} pixels ({len(wrong)} such boxes): mend the annotations"
        )
    return part


def check_polygons(annotated: Annotated) -> None:
    """Whether polygons lie at the boxes of their objects; what is no polygon is left to ``mask_of``.

    Raises:
        DataError: one that does not, by its image: it is not in pixels, or of another image.
    """
    objects: Objects = annotated.objects
    for number, outline in enumerate(objects.masks or ()):
        try:
            parts = [np.array(part, np.float64).reshape(-1, 2) for part in outline] if type(outline) is list else []
        except (TypeError, ValueError):
            continue
        if not sum(map(len, parts)):
            continue
        points = np.concatenate(parts)
        low, high, box = points.min(axis=0), points.max(axis=0), objects.boxes[number]
        if (high < box[:2] - ROUNDING).any() or (low > box[:2] + box[2:] + ROUNDING).any():
            image = int(np.searchsorted(objects.starts, number, side="right")) - 1
            both = ((*low, *high), (*box[:2], *(box[:2] + box[2:])))
            spans = [" ".join(f"{value:g}" for value in span) for span in both]
            raise DataError(
                f"{annotated.images.names[image]}: the polygons of its object {number - int(objects.starts[image])} "
                f"span {spans[0]} (left, top, right, bottom), its box {spans[1]}: mend the annotations, or set "
                "task.masks=false"
            )


def mask_of(outline: Any, height: int, width: int) -> np.ndarray:
    """A mask as COCO's files have it, polygons or a run-length encoding: uint8 ``[height, width]``.

    Raises:
        ValueError: it is neither, or of another size.
    """
    try:
        parts = hotcoco.mask.frPyObjects(outline, height, width)
        mask = hotcoco.mask.decode(hotcoco.mask.merge(parts) if isinstance(parts, list) else parts)
    except Exception as error:  # hotcoco raises several types
        raise ValueError(first_line(error)) from error
    if isinstance(outline, dict) and isinstance(runs := outline["counts"], list) and sum(runs) != height * width:
        raise ValueError(f"its counts are of {sum(runs)} pixels")
    if mask.shape != (height, width):
        raise ValueError(f"it has {mask.shape[1]} x {mask.shape[0]} pixels")
    return np.ascontiguousarray(mask)
