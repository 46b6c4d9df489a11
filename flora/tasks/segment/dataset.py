"""Images with masks that are opened when a batch asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from flora.errors import DataError, first_line
from flora.tasks.base import Batch
from flora.tasks.images.decode import as_rgb
from flora.tasks.images.lazy import LazyRows
from flora.tasks.segment.datasets import IGNORED, Dataset
from flora.tasks.segment.files import Scene

_MASKS = ("L", "P", "I", "I;16")  # modes of Pillow that hold one number a pixel
# (image, labels, generator) -> uint8 [h, w, 3] and int16 [H, W]; without a generator nothing is drawn.
Change = Callable[[Image.Image, np.ndarray, np.random.RandomState | None], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Catalogue:
    """All scenes of a data set.

    Attributes:
        scenes: of all splits.
        dataset: what masks mean.
        skip: leave out scenes that cannot be decoded; otherwise they are an error.
        unreadable: bool ``[N]``, which turned out so; in memory that worker processes share.
    """

    scenes: Sequence[Scene]
    dataset: Dataset
    skip: bool
    unreadable: Tensor

    def skipped(self) -> list[str]:
        """Names of the scenes that could not be decoded, in their order."""
        return [self.scenes[row].name for row in self.unreadable.nonzero().flatten().tolist()]

    def read(self, row: int) -> tuple[Image.Image, np.ndarray] | None:
        """The image in RGB and its labels int16 ``[H, W]``; None for one that is skipped, and noted.

        Pixels are taken as they lie, whatever the EXIF says: masks are drawn over them.

        Raises:
            DataError: it cannot be decoded and is not skipped, or the mask is not one of the image and the data set.
        """
        scene = self.scenes[row]
        try:
            image = as_rgb(scene.image, scene.name, "stored")
            mask = _decoded(scene)
        except DataError:
            if not self.skip:
                raise
            self.unreadable[row] = True
            return None
        if mask.mode not in _MASKS:
            raise DataError(
                f"{scene.name}: its mask has pixels of mode {mask.mode}: save the classes as one number each"
            )
        if mask.size != image.size:
            raise DataError(
                f"{scene.name}: its mask is {mask.width} x {mask.height}, the image {image.width} x {image.height} "
                "pixels: pair each image with its own mask"
            )
        numbers = np.asarray(mask)
        try:
            if numbers.max() > 255 or numbers.min() < 0:
                raise ValueError(f"it has class {int(numbers.max())}, beyond a byte")
            return image, self.dataset.labels(numbers.astype(np.uint8))
        except ValueError as error:
            raise DataError(f"{scene.name}: its mask is of another data set: {error}") from error


class LazyScenes(LazyRows):
    """Images with masks that are opened when a batch asks for them.

    Args:
        catalogue: where they are.
        rows: which of them, int64 ``[N]``.
        change: from an image and its labels to what a batch holds of them.
        draws: whether that is random. It then depends on the seed, the epoch and the image alone. All squares are of
            one size; otherwise images are of any size, and batches are filled up.
    """

    catalogue: Catalogue

    def __init__(self, catalogue: Catalogue, rows: np.ndarray, change: Change, draws: bool) -> None:
        super().__init__(catalogue, rows, once=not draws)
        self.change, self.draws = change, draws

    def _batch(self, examples: Sequence[tuple[np.ndarray, np.ndarray]], rows: Sequence[int]) -> Batch:
        """Images and labels, filled up to one size.

        ``pixel_values`` uint8 ``[B, 3, h, w]`` and ``labels`` int16 ``[B, H, W]``, ``IGNORED`` where a pixel does not
        count. In an evaluation also ``sizes`` int64 ``[B, 4]``, heights and widths of image and labels before they were
        filled up at the bottom and on the right, and ``rows`` int64 ``[B]`` of the catalogue.
        """
        pixels, labels = zip(*examples, strict=True)
        batch = {
            "pixel_values": _filled([torch.from_numpy(image).permute(2, 0, 1) for image in pixels], 0),
            "labels": _filled([torch.from_numpy(label) for label in labels], IGNORED),
        }
        if self.draws:
            return batch
        sizes = [(*image.shape[:2], *label.shape) for image, label in examples]
        return batch | {"sizes": torch.tensor(sizes), "rows": torch.tensor(rows)}

    def _name(self, row: int) -> str:
        return self.catalogue.scenes[row].name

    def _with(self, rows: np.ndarray) -> LazyScenes:
        return LazyScenes(self.catalogue, rows, self.change, self.draws)

    def _decode(self, row: int) -> tuple[np.ndarray, np.ndarray] | None:
        if (read := self.catalogue.read(int(row))) is None:
            return None
        random = np.random.SeedSequence((*self.moment, int(row))) if self.draws else None
        pixels, labels = self.change(*read, np.random.RandomState(np.random.MT19937(random)) if random else None)
        return np.array(pixels, order="C"), np.array(labels, order="C")  # copies: Pillow's own cannot be written


def _decoded(scene: Scene) -> Image.Image:
    try:
        with scene.mask() as mask:
            mask.load()
            return mask
    # Pillow's decoders raise almost any type on broken bytes: OSError, SyntaxError, struct.error, zlib.error, ...
    except Exception as error:
        raise DataError(
            f"{scene.name}: mask cannot be decoded ({first_line(error)}); mend it or set task.unreadable=skip"
        ) from error


def _filled(tensors: Sequence[Tensor], value: int) -> Tensor:
    """One tensor of several that differ in their last two dimensions, filled up at their ends."""
    height, width = (max(tensor.shape[dim] for tensor in tensors) for dim in (-2, -1))
    padded = [F.pad(t, (0, width - t.shape[-1], 0, height - t.shape[-2]), value=value) for t in tensors]
    return torch.stack(padded)
