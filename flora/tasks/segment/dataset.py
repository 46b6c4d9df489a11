"""Images with masks that are opened when a batch asks for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset as TorchDataset

from flora.errors import DataError, first_line
from flora.tasks.base import COUNTS, Batch, draw
from flora.tasks.imagefolder.dataset import threads
from flora.tasks.images.decode import as_rgb, stand_in
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


class LazyScenes(TorchDataset[Batch]):
    """Images with masks that are opened when a batch asks for them.

    Args:
        catalogue: where they are.
        rows: which of them, int64 ``[N]``.
        change: from an image and its labels to what a batch holds of them.
        draws: whether that is random. It then depends on the seed, the epoch and the image alone. All squares are of
            one size; otherwise images are of any size, and batches are filled up.
    """

    def __init__(self, catalogue: Catalogue, rows: np.ndarray, change: Change, draws: bool) -> None:
        self.catalogue, self.rows, self.change, self.draws = catalogue, rows, change, draws
        self.moment = (0, 0)

    @property
    def unreadable(self) -> Tensor:
        """Of all scenes of the catalogue, which were met and could not be decoded."""
        return self.catalogue.unreadable

    def begin_epoch(self, seed: int, epoch: int) -> None:
        """Say what random numbers depend on, beside the image."""
        self.moment = (seed, epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        """One example."""
        return {name: value[0] for name, value in self.__getitems__([index]).items() if name != COUNTS}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A batch without scenes that are skipped; where all are, the next that can be decoded stands in.

        ``pixel_values`` uint8 ``[B, 3, h, w]`` and ``labels`` int16 ``[B, H, W]``, ``IGNORED`` where a pixel does not
        count. In an evaluation also ``sizes`` int64 ``[B, 4]``, heights and widths of image and labels before they were
        filled up at the bottom and on the right, and ``rows`` int64 ``[B]`` of the catalogue.
        """
        rows = self.rows[list(indices)]
        decoded = list(threads(os.getpid()).map(self._decode, rows))
        kept = [(*both, int(row)) for both, row in zip(decoded, rows, strict=True) if both is not None]
        if not kept:
            instead = stand_in(indices[-1], len(self), lambda index: self._decode(self.rows[index]) is not None)
            if instead:
                return self.__getitems__(instead) | ({} if self.draws else {COUNTS: torch.tensor(False)})
            name = self.catalogue.scenes[rows[0]].name
            raise DataError(f"{name}, {len(rows) - 1} more of its batch and those after it: none can be decoded")
        pixels, labels, own = zip(*kept, strict=True)
        batch = {
            "pixel_values": _filled([torch.from_numpy(image).permute(2, 0, 1) for image in pixels], 0),
            "labels": _filled([torch.from_numpy(label) for label in labels], IGNORED),
        }
        if self.draws:
            return batch
        sizes = [(*image.shape[:2], *label.shape) for image, label, _ in kept]
        return batch | {"sizes": torch.tensor(sizes), "rows": torch.tensor(own)}

    def concat(self, other: LazyScenes) -> LazyScenes:
        """Both after each other, under this one's change; of one catalogue."""
        assert other.catalogue is self.catalogue
        return LazyScenes(self.catalogue, np.concatenate([self.rows, other.rows]), self.change, self.draws)

    def subset(self, count: int, seed: int = 0) -> LazyScenes:
        """``count`` examples in their old order, drawn with ``seed``."""
        if count >= len(self):
            return self
        return LazyScenes(self.catalogue, self.rows[np.sort(draw(len(self), seed)[:count])], self.change, self.draws)

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
