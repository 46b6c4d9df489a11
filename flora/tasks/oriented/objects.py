"""Objects as quadrilaterals, and images cut into tiles with the objects in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flora.models import quads
from flora.tasks.detect.objects import Annotated, joined_starts


@dataclass(frozen=True)
class Oriented:
    """The objects of ``M`` images, ``N`` in all; those of image ``i`` are ``starts[i]`` to ``starts[i + 1]``.

    Attributes:
        corners: float64 ``[N, 4, 2]``, x and y in pixels, in either turn, as the file has them.
        classes: int64 ``[N]``, indices from 0.
        difficult: bool ``[N]``, hard to see: learnt from, but neither found nor missed.
        starts: int64 ``[M + 1]``.
    """

    corners: np.ndarray
    classes: np.ndarray
    difficult: np.ndarray
    starts: np.ndarray

    def of(self, image: int) -> slice:
        """The objects of an image."""
        return slice(int(self.starts[image]), int(self.starts[image + 1]))

    def outlines(self, image: int) -> np.ndarray:
        """The corners of an image's objects, float64 ``[n, 4, 2]``."""
        return self.corners[self.of(image)]

    @classmethod
    def joined(cls, of: Sequence[Oriented]) -> Oriented:
        """Objects of images after each other."""
        corners, classes, difficult = (
            np.concatenate([getattr(o, name) for o in of]) for name in ("corners", "classes", "difficult")
        )
        return cls(corners, classes, difficult, joined_starts([o.starts for o in of]))


def places(height: int, width: int, tile: int, overlap: int) -> np.ndarray:
    """Where tiles lie in an image: top, left, height and width, int64 ``[K, 4]``.

    They are ``tile`` pixels a side and share ``overlap`` pixels with their neighbours. The last ones end where the
    image ends, as in DOTA_devkit, and share more. An image that is smaller has one tile, of its own size.
    """

    def starts(size: int) -> list[int]:
        return [*range(0, max(size - tile, 0), tile - overlap), max(size - tile, 0)]

    high, wide = min(height, tile), min(width, tile)
    return np.array([[top, left, high, wide] for top in starts(height) for left in starts(width)], np.int64)


@dataclass(frozen=True)
class Tiled:
    """Images cut into ``K`` tiles.

    Attributes:
        annotated: the images.
        image: of each tile, int64 ``[K]``, ascending.
        places: see ``places``, int64 ``[K, 4]``.
        members: objects of the tiles, one after the other, int64: those that show enough of themselves.
        starts: int64 ``[K + 1]``, where those of each tile begin.
    """

    annotated: Annotated
    image: np.ndarray
    places: np.ndarray
    members: np.ndarray
    starts: np.ndarray

    @property
    def unreadable(self) -> Tensor:
        """Which images could not be decoded, bool ``[M]``."""
        return self.annotated.unreadable

    def of(self, images: np.ndarray) -> np.ndarray:
        """The tiles of these images ``[n]``, in their order, int64."""
        first, last = np.searchsorted(self.image, images), np.searchsorted(self.image, images, side="right")
        return np.concatenate([np.zeros(0, np.int64), *map(np.arange, first, last)])

    def learnt(self, tile: int) -> tuple[np.ndarray, np.ndarray]:
        """The objects of a tile: corners seen from its upper left ``[n, 4, 2]``, classes ``[n]``."""
        which = self.members[self.starts[tile] : self.starts[tile + 1]]
        objects: Oriented = self.annotated.objects
        return objects.corners[which] - self.places[tile, [1, 0]], objects.classes[which]


def tiled(annotated: Annotated, tile: int, overlap: int, visible: float) -> Tiled:
    """Cut images into tiles.

    An object belongs to each tile that shows at least the share ``visible`` of it, in whole: it may reach out. One
    without area belongs to none.
    """
    objects: Oriented = annotated.objects
    each = [places(int(h), int(w), tile, overlap) for h, w in annotated.images.sizes]
    image = np.repeat(np.arange(len(each)), [len(part) for part in each])
    where = np.concatenate([np.zeros((0, 4), np.int64), *each])
    corners = torch.from_numpy(objects.corners)
    space, hulls = quads.areas(corners), quads.hulls(corners)
    top, left, height, width = torch.from_numpy(where).double().unbind(1)
    frames = torch.stack([left, top, left + width, top + height], dim=1)
    firsts = np.searchsorted(image, np.arange(len(each) + 1))
    pairs = []
    for number in range(len(each)):  # tiles and objects of one image alone
        inside, these = objects.of(number), slice(firsts[number], firsts[number + 1])
        at, which = quads.touching(frames[these], hulls[inside])
        pairs.append(torch.stack([at + these.start, which + inside.start]))
    at, which = torch.cat([torch.zeros(2, 0, dtype=torch.int64), *pairs], dim=1)
    seen = quads.intersections(quads.corners(frames[at]), corners[which])
    # A hair less: what is seen in whole need not be all of it by rounding.
    enough = (space[which] > 0) & (seen >= visible * space[which] * (1 - 1e-9))
    at, which = at[enough], which[enough]
    counts = torch.bincount(at, minlength=len(where)).numpy()
    return Tiled(annotated, image, where, which.numpy(), np.cumsum([0, *counts]))
