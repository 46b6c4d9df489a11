"""Conversations as token sequences with the images that they show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flora.errors import ConfigError, DataError
from flora.tasks.base import COUNTS, Batch, draw
from flora.tasks.images.decode import stand_in
from flora.tasks.text.dataset import TextDataset
from flora.tasks.vqa.dialogues import Pictures


class Shown(Dataset[Batch]):
    """Sequences and the images that they show, decoded when a batch asks for them.

    Args:
        rows: the sequences, padded on the left.
        images: of each, indices into ``pictures``.
        pictures: every image of the task.
        pixels: from an RGB image to uint8 ``[H, W, 3]``.
        unreadable: bool ``[all images]``, takes note of those that cannot be decoded, in memory that worker processes
            share; None: they are an error.
        once: whether each example counts once, as in an evaluation, so that one which stands in does not.
    """

    def __init__(
        self,
        rows: TextDataset,
        images: Sequence[tuple[int, ...]],
        pictures: Pictures,
        pixels: Callable[[Any], np.ndarray],
        unreadable: Tensor | None = None,
        once: bool = False,
    ):
        self.rows, self.images, self.pictures = rows, images, pictures
        self.pixels, self.unreadable, self.once = pixels, unreadable, once
        self.lengths = rows.lengths

    @property
    def shows(self) -> list[bool]:
        """Whether each example shows an image."""
        return [bool(images) for images in self.images]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        """A batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Fields of TextDataset ``[B, L]`` or ``[B]``, and ``pixel_values`` uint8 ``[images, 3, H, W]`` if any.

        Examples with an image that is skipped are left out; where that is all, the next that can be shown stands in.
        """
        decoded = {i: self._decode(i) for i in sorted({i for index in indices for i in self.images[index]})}
        kept = [index for index in indices if all(decoded[i] is not None for i in self.images[index])]
        if not kept:
            if instead := stand_in(indices[-1], len(self), self._can_be_shown):
                return self.__getitems__(instead) | ({COUNTS: torch.tensor(False)} if self.once else {})
            name = self.pictures.names[self.images[indices[0]][0]]
            raise DataError(f"{name}, {len(indices) - 1} more of its batch and those after it: none can be decoded")
        batch = self.rows.__getitems__(kept)
        if shown := [decoded[i] for index in kept for i in self.images[index]]:
            batch["pixel_values"] = torch.from_numpy(np.stack(shown).transpose(0, 3, 1, 2))  # type: ignore[arg-type]
        return batch

    def concat(self, other: Shown) -> Shown:
        """Both after each other; ConfigError where one is to be answered."""
        if self.rows.tokens.keys() != other.rows.tokens.keys():
            raise ConfigError("protocol.final_train: this task cannot train on its validation split; set it to train")
        return self._with(self.rows.concat(other.rows), [*self.images, *other.images])

    def padded_to(self, multiple: int) -> Shown:
        """The same with sequences as wide as a multiple of so many tokens."""
        return self._with(self.rows.padded_to(multiple), self.images)

    def subset(self, count: int, seed: int = 0) -> Shown:
        """``count`` examples in their old order, drawn with ``seed``."""
        if count >= len(self):
            return self
        chosen = np.sort(draw(len(self), seed)[:count])
        return self._with(self.rows.take(chosen), [self.images[i] for i in chosen])

    def _with(self, rows: TextDataset, images: Sequence[tuple[int, ...]]) -> Shown:
        return Shown(rows, images, self.pictures, self.pixels, self.unreadable, self.once)

    def _can_be_shown(self, index: int) -> bool:
        return all(self._decode(i) is not None for i in self.images[index])

    def _decode(self, index: int) -> np.ndarray | None:
        try:
            return self.pixels(self.pictures.rgb(index))
        except DataError:
            if self.unreadable is None:
                raise
            self.unreadable[index] = True
            return None
