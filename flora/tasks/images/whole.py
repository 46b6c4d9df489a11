"""Images of the user's own in whatever size they have, for tasks that say something of each place in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from flora.errors import DataError
from flora.tasks.base import Batch
from flora.tasks.images.decode import Picture, as_picture, as_rgb
from flora.tasks.images.lazy import LazyRows


@dataclass(frozen=True)
class Pictures:
    """Images, not opened yet.

    Attributes:
        pictures: see ``flora.tasks.images.decode.Picture``.
        unreadable: bool ``[N]``, which could not be decoded; in memory that worker processes share.
    """

    pictures: Sequence[Picture]
    unreadable: Tensor


class WholeImages(LazyRows):
    """Images in their own size and as they are stored, filled up to one size in a batch.

    Args:
        catalogue: where they are.
        rows: which of them, int64 ``[N]``.
        change: from an RGB image to what enters the network of it, uint8 ``[h, w, 3]``.
        skip: leave out images that cannot be decoded; otherwise they are an error.
    """

    catalogue: Pictures

    def __init__(
        self, catalogue: Pictures, rows: np.ndarray, change: Callable[[Image.Image], np.ndarray], skip: bool
    ) -> None:
        super().__init__(catalogue, rows, once=True)
        self.change, self.skip = change, skip

    @classmethod
    def of(cls, inputs: Sequence[object], change: Callable[[Image.Image], np.ndarray], skip: bool) -> WholeImages:
        """Of what ``as_picture`` takes."""
        pictures = [as_picture(image, number) for number, image in enumerate(inputs)]
        noted = torch.zeros(len(pictures), dtype=torch.bool).share_memory_()
        return cls(Pictures(pictures, noted), np.arange(len(pictures)), change, skip)

    def _batch(self, examples: Sequence[tuple[np.ndarray, tuple[int, int]]], rows: Sequence[int]) -> Batch:
        """A batch, filled up at the bottom and on the right.

        Returns:
            ``pixel_values`` uint8 ``[B, 3, h, w]``, ``sizes`` int64 ``[B, 4]``, heights and widths of what enters and
            of the images themselves, and ``labels`` int64 ``[B]``, their numbers.
        """
        sizes = [(*pixels.shape[:2], *stored) for pixels, stored in examples]
        height, width = (max(size[side] for size in sizes) for side in (0, 1))
        images = [torch.from_numpy(pixels).permute(2, 0, 1) for pixels, _ in examples]
        filled = [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
        return {"pixel_values": torch.stack(filled), "sizes": torch.tensor(sizes), "labels": torch.tensor(rows)}

    def _name(self, row: int) -> str:
        return self.catalogue.pictures[row].name

    def _with(self, rows: np.ndarray) -> WholeImages:
        return WholeImages(self.catalogue, rows, self.change, self.skip)

    def _decode(self, row: int) -> tuple[np.ndarray, tuple[int, int]] | None:
        picture = self.catalogue.pictures[row]
        try:
            image = as_rgb(picture.open, picture.name, "stored")
        except DataError:
            if not self.skip:
                raise
            self.catalogue.unreadable[row] = True
            return None
        return np.array(self.change(image), order="C"), (image.height, image.width)
