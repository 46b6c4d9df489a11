"""Decoded images in memory, gathered batch by batch with one indexing call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flora.tasks.base import draw


class ImageDataset(Dataset[dict[str, Tensor]]):
    """Decoded images in memory; a batch is gathered with one indexing call.

    Args:
        images: uint8 ``[N, 3, H, W]``. Grey images may be an expanded ``[N, 1, H, W]``: it takes a third of the memory.
        labels: int64 ``[N]``, class indices.

    Raises:
        ValueError: on another dtype or shape.
    """

    def __init__(self, images: Tensor, labels: Tensor):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 [N, 3, H, W], not {images.dtype} {list(images.shape)}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be int64 [{len(images)}], not {labels.dtype} {list(labels.shape)}")
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One example: ``pixel_values`` uint8 ``[3, H, W]`` and ``labels`` int64 ``[]``."""
        return {"pixel_values": self.images[index], "labels": self.labels[index]}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A whole batch: ``pixel_values`` uint8 ``[B, 3, H, W]`` and ``labels`` int64 ``[B]``.

        The DataLoader hands it to ``collate_fn``, which is then the identity.
        """
        chosen = torch.as_tensor(indices)
        if self.images.is_cuda:  # a copy from pinned memory does not wait for the GPU
            chosen = chosen.pin_memory().to(self.images.device, non_blocking=True)
        return {"pixel_values": self.images.index_select(0, chosen), "labels": self.labels[chosen]}

    @property
    def nbytes(self) -> int:
        """Bytes of the images and labels."""
        return self._bands().nbytes + self.labels.nbytes

    def to(self, device: torch.device | str) -> ImageDataset:
        """The same examples on a device, where their batches are then gathered."""
        return ImageDataset(self._bands().to(device).expand_as(self.images), self.labels.to(device))

    def _bands(self) -> Tensor:
        """The channels that memory holds: one of grey images, else all."""
        return self.images[:, :1] if self.images.stride(1) == 0 else self.images

    def concat(self, other: ImageDataset) -> ImageDataset:
        """Both after each other, copied; unlike torch's ConcatDataset the result still gathers a batch in one call."""
        return ImageDataset(torch.cat([self.images, other.images]), torch.cat([self.labels, other.labels]))

    def subset(self, count: int, seed: int = 0) -> ImageDataset:
        """``count`` examples in their old order, drawn with ``seed``: stored splits are often sorted by class."""
        if count >= len(self):
            return self
        chosen = torch.from_numpy(np.sort(draw(len(self), seed)[:count]))
        return ImageDataset(self.images.index_select(0, chosen), self.labels[chosen])
