"""Tiles to train on, and whole images with their tiles to evaluate, opened when a batch asks for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from flora.errors import DataError
from flora.tasks.base import Batch
from flora.tasks.images.decode import as_rgb
from flora.tasks.images.lazy import LazyRows
from flora.tasks.oriented.objects import Tiled


class _Opened(LazyRows):
    """What both share.

    Args:
        catalogue: the images and their tiles.
        rows: see LazyRows.
        skip: leave out images that cannot be decoded; otherwise they are an error.
        once: see LazyRows.
    """

    catalogue: Tiled

    def __init__(self, catalogue: Tiled, rows: np.ndarray, skip: bool, once: bool) -> None:
        super().__init__(catalogue, rows, once)
        self.skip = skip

    def __getitem__(self, index: int) -> Batch:
        """A batch of one."""
        return self.__getitems__([index])

    def _opened(self, image: int) -> np.ndarray | None:
        images = self.catalogue.annotated.images
        try:  # as they are stored: corners are counted from there
            pixels = np.asarray(as_rgb(images.openers[image], images.names[image], "stored"))
        except DataError:
            if not self.skip:
                raise
            self.catalogue.unreadable[image] = True
            return None
        if pixels.shape[:2] != tuple(images.sizes[image]):
            raise DataError(f"{images.names[image]} has changed its size since it was looked at: start again")
        return pixels

    def _joined(self, pictures: Sequence[np.ndarray], images: Sequence[int], shown: Sequence[Sequence[int]]) -> Batch:
        """A batch of pictures, of which tiles are shown.

        Args:
            pictures: uint8 ``[h, w, 3]`` each, ``B`` of them.
            images: their numbers.
            shown: of each of ``T`` tiles its place in the batch, its number, and the top and left of it in the picture.

        Returns:
            ``pixel_values`` uint8 ``[B, 3, H, W]``, each in the upper left corner, black beside it; ``labels`` int64
            ``[B]``, numbers of the images; ``tiles`` int64 ``[T, 5]``, place in the batch, top, left, height, width;
            ``found`` int64 ``[T]``, how many of the objects are in each; ``quads`` float32 ``[N, 4, 2]``, corners seen
            from the tile's upper left; ``classes`` int64 ``[N]``.
        """
        height, width = np.array([picture.shape[:2] for picture in pictures]).max(axis=0)
        pixels = np.zeros((len(pictures), height, width, 3), np.uint8)
        for place, picture in zip(pixels, pictures, strict=True):
            place[: picture.shape[0], : picture.shape[1]] = picture
        sizes = self.catalogue.places[[number for _, number, _, _ in shown], 2:]
        tiles = np.array([[place, top, left] for place, _, top, left in shown], np.int64)
        learnt = [self.catalogue.learnt(number) for _, number, _, _ in shown]
        return {
            "pixel_values": torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
            "labels": torch.tensor(images, dtype=torch.int64),
            "tiles": torch.from_numpy(np.concatenate([tiles, sizes], axis=1)),
            "found": torch.tensor([len(classes) for _, classes in learnt], dtype=torch.int64),
            "quads": torch.from_numpy(np.concatenate([corners for corners, _ in learnt]).astype(np.float32)),
            "classes": torch.from_numpy(np.concatenate([classes for _, classes in learnt])),
        }


class Tiles(_Opened):
    """Tiles to train on: rows are numbers of tiles."""

    def concat(self, other: Tiles | Images) -> Tiles:  # type: ignore[override]
        """These and those of other images that show an object."""
        more = other.rows if isinstance(other, Tiles) else with_objects(self.catalogue, other.rows)
        return self._with(np.concatenate([self.rows, more]))

    def _decode(self, row: int) -> np.ndarray | None:
        if (pixels := self._opened(int(self.catalogue.image[row]))) is None:
            return None
        top, left, height, width = self.catalogue.places[row]
        return pixels[top : top + height, left : left + width]

    def _batch(self, examples: Sequence[np.ndarray], rows: Sequence[int]) -> Batch:
        images = self.catalogue.image[list(rows)].tolist()
        return self._joined(examples, images, [(place, row, 0, 0) for place, row in enumerate(rows)])

    def _name(self, row: int) -> str:
        return self.catalogue.annotated.images.names[self.catalogue.image[row]]

    def _with(self, rows: np.ndarray) -> Tiles:
        return Tiles(self.catalogue, rows, self.skip, self.once)


class Images(_Opened):
    """Whole images to evaluate, each with all its tiles: rows are numbers of images."""

    def _decode(self, row: int) -> np.ndarray | None:
        return self._opened(row)

    def _batch(self, examples: Sequence[np.ndarray], rows: Sequence[int]) -> Batch:
        shown = [
            (place, int(number), *self.catalogue.places[number, :2].tolist())
            for place, row in enumerate(rows)
            for number in self.catalogue.of(np.array([row]))
        ]
        return self._joined(examples, rows, shown)

    def _name(self, row: int) -> str:
        return self.catalogue.annotated.images.names[row]

    def _with(self, rows: np.ndarray) -> Images:
        return Images(self.catalogue, rows, self.skip, self.once)


def with_objects(catalogue: Tiled, images: np.ndarray) -> np.ndarray:
    """The tiles of images ``[n]`` that show an object, int64."""
    tiles = catalogue.of(images)
    return tiles[np.diff(catalogue.starts)[tiles] > 0]
