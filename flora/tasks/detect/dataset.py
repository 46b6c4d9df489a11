"""Annotated images that are opened when a batch asks for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from flora.errors import DataError
from flora.tasks.base import Batch
from flora.tasks.detect.objects import Annotated, mask_of
from flora.tasks.images.decode import as_rgb
from flora.tasks.images.lazy import LazyRows


class AnnotatedImages(LazyRows):
    """Annotated images that are opened when a batch asks for them.

    Args:
        catalogue: where they are.
        rows: which of them, int64 ``[N]``.
        masks: give the masks of objects as well.
        skip: leave out images that cannot be decoded; otherwise they are an error.
        once: whether each image counts once, as in an evaluation, so that one which stands in does not.
    """

    catalogue: Annotated

    def __init__(
        self, catalogue: Annotated, rows: np.ndarray, masks: bool = False, skip: bool = False, once: bool = False
    ) -> None:
        super().__init__(catalogue, rows, once)
        self.masks, self.skip = masks, skip

    def __getitem__(self, index: int) -> Batch:
        """A batch of one."""
        return self.__getitems__([index])

    def _batch(self, examples: Sequence[np.ndarray], rows: Sequence[int]) -> Batch:
        """The images of a batch, and the ``N`` objects in them to learn from: those with an area that are no crowds.

        Returns:
            ``pixel_values`` uint8 ``[B, 3, H, W]``, each in the upper left corner, black beside it; ``sizes`` int64
            ``[B, 2]``, height and width; ``labels`` int64 ``[B]``, numbers of the images; ``found`` int64 ``[B]``, how
            many of the objects are in each; ``boxes`` float32 ``[N, 4]``, left, top, right, bottom; ``classes`` int64
            ``[N]``; with ``masks``: those, uint8 ``[N, H, W]``.
        """
        objects = self.catalogue.objects
        sizes = np.array([image.shape[:2] for image in examples])
        height, width = sizes.max(axis=0)
        pixels = np.zeros((len(examples), height, width, 3), np.uint8)
        for place, image in zip(pixels, examples, strict=True):
            place[: image.shape[0], : image.shape[1]] = image
        taken = [self._learnt(row, size) for row, size in zip(rows, sizes, strict=True)]
        batch = {
            "pixel_values": torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
            "sizes": torch.from_numpy(sizes.astype(np.int64)),
            "labels": torch.tensor(rows, dtype=torch.int64),
            "found": torch.tensor([len(which) for which, _ in taken], dtype=torch.int64),
            "boxes": torch.from_numpy(np.concatenate([boxes for _, boxes in taken]).astype(np.float32)),
            "classes": torch.from_numpy(objects.classes[np.concatenate([which for which, _ in taken])]),
        }
        if self.masks:
            assert objects.masks is not None
            masks = np.zeros((len(batch["classes"]), height, width), np.uint8)
            shown = zip(rows, taken, sizes.tolist(), strict=True)
            every = [(row, i, size) for row, (which, _), size in shown for i in which.tolist()]
            for place, (row, i, size) in zip(masks, every, strict=True):
                place[: size[0], : size[1]] = self._mask(row, i, *size)
            batch["masks"] = torch.from_numpy(masks)
        return batch

    def _mask(self, row: int, number: int, height: int, width: int) -> np.ndarray:
        outlines, first = self.catalogue.objects.masks, int(self.catalogue.objects.starts[row])
        assert outlines is not None
        try:
            return mask_of(outlines[number], height, width)
        except ValueError as error:
            raise DataError(
                f"{self._name(row)}: the mask of its object {number - first} is no outline of COCO's ({error}): "
                "mend the annotations, or set task.masks=false"
            ) from error

    def _learnt(self, row: int, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which objects of an image are learnt from, and their corners ``[n, 4]`` within the image."""
        objects, (height, width) = self.catalogue.objects, size
        which = np.arange(*objects.of(row).indices(len(objects.boxes)))
        boxes = objects.boxes[which]
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        corners = corners.clip(0, [width, height, width, height])
        good = ~objects.crowds[which] & (corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1])
        return which[good], corners[good]

    def _name(self, row: int) -> str:
        return self.catalogue.images.names[row]

    def _with(self, rows: np.ndarray) -> AnnotatedImages:
        return AnnotatedImages(self.catalogue, rows, self.masks, self.skip, self.once)

    def _decode(self, row: int) -> np.ndarray | None:
        images = self.catalogue.images
        try:  # as they are stored: boxes are counted from there
            image = np.asarray(as_rgb(images.openers[row], images.names[row], "stored"))
        except DataError:
            if not self.skip:
                raise
            self.catalogue.unreadable[row] = True
            return None
        if image.shape[:2] != tuple(images.sizes[row]):
            (height, width), (said, wide) = image.shape[:2], images.sizes[row]
            raise DataError(
                f"{images.names[row]}: the image has {width} x {height} pixels, its annotations are for "
                f"{wide} x {said}: they are of another set, or it was resized"
            )
        return image
