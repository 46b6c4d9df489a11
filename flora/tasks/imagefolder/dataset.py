"""Images that are opened when a batch asks for them, under transforms that draw alike wherever they run."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from flora.errors import DataError
from flora.tasks.base import COUNTS, Batch, draw
from flora.tasks.images.decode import as_rgb, stand_in


@dataclass(frozen=True)
class Catalogue:
    """All images of a folder.

    Attributes:
        openers: one function an image, that opens it.
        labels: class indices ``[N]``.
        names: what messages call the images.
        unreadable: bool ``[N]``, which turned out so; in memory that worker processes share.
        orientation: how images are turned, see ``as_rgb``.
    """

    openers: Sequence[Callable[[], Image.Image]]
    labels: np.ndarray
    names: Sequence[str]
    unreadable: Tensor
    orientation: str = "exif"

    def skipped(self) -> list[str]:
        """Names of the images that could not be decoded, sorted."""
        return sorted(self.names[row] for row in self.unreadable.nonzero().flatten().tolist())


class LazyImages(Dataset[Batch]):
    """Images that are opened when a batch asks for them.

    Args:
        catalogue: where they are.
        rows: which of them, int64 ``[N]``.
        transform: from an RGB image to uint8 ``[3, H, W]``.
        draws: whether the transform is random. It then depends on the seed, the epoch and the image alone: not on
            threads, worker processes, the order of images or where a run was resumed.
        skip: leave out images that cannot be decoded; otherwise they are an error.
        once: whether each image counts once, as in an evaluation, so that one which stands in does not.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        rows: np.ndarray,
        transform: Callable[[Image.Image], np.ndarray],
        draws: bool = False,
        skip: bool = False,
        once: bool = False,
    ):
        self.catalogue, self.rows, self.transform, self.draws, self.skip = catalogue, rows, transform, draws, skip
        self.once = once
        self.moment = (0, 0)

    @property
    def labels(self) -> np.ndarray:
        """Class indices ``[N]``."""
        return self.catalogue.labels[self.rows]

    @property
    def unreadable(self) -> Tensor:
        """Of all images of the catalogue, which were met and could not be decoded."""
        return self.catalogue.unreadable

    def begin_epoch(self, seed: int, epoch: int) -> None:
        """Say what the random numbers of a transform depend on, beside the image."""
        self.moment = (seed, epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        """One example."""
        return {name: value[0] for name, value in self.__getitems__([index]).items() if name != COUNTS}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """``pixel_values`` uint8 ``[B, 3, H, W]`` and ``labels`` int64 ``[B]``, without images that are skipped.

        Where all are skipped, the next image that can be decoded stands in.
        """
        rows = self.rows[list(indices)]
        with _generators_kept() if self.draws else contextlib.nullcontext():
            decoded = list(threads(os.getpid()).map(self._decode, rows))
        kept = [(pixels, row) for pixels, row in zip(decoded, rows, strict=True) if pixels is not None]
        if not kept:
            instead = stand_in(indices[-1], len(self), lambda index: self._decode(self.rows[index]) is not None)
            if instead:
                return self.__getitems__(instead) | ({COUNTS: torch.tensor(False)} if self.once else {})
            name = self.catalogue.names[rows[0]]
            raise DataError(f"{name}, {len(rows) - 1} more of its batch and those after it: none can be decoded")
        pixels, whole = zip(*kept, strict=True)
        return {
            "pixel_values": torch.from_numpy(np.stack(pixels)),
            "labels": torch.from_numpy(self.catalogue.labels[list(whole)]),
        }

    def concat(self, other: LazyImages) -> LazyImages:
        """Both after each other, under this one's transform; of one catalogue."""
        assert other.catalogue is self.catalogue
        return self._with(np.concatenate([self.rows, other.rows]))

    def subset(self, count: int, seed: int = 0) -> LazyImages:
        """``count`` examples in their old order, drawn with ``seed``."""
        return self if count >= len(self) else self._with(self.rows[np.sort(draw(len(self), seed)[:count])])

    def _with(self, rows: np.ndarray) -> LazyImages:
        return LazyImages(self.catalogue, rows, self.transform, self.draws, self.skip, self.once)

    def _decode(self, row: int) -> np.ndarray | None:
        try:
            rgb = as_rgb(self.catalogue.openers[row], self.catalogue.names[row], self.catalogue.orientation)
        except DataError:
            if not self.skip:
                raise
            self.catalogue.unreadable[row] = True
            return None
        if not self.draws:
            return np.asarray(self.transform(rgb))
        with _one_at_a_time:
            _seed_generators(*self.moment, int(row))
            return np.asarray(self.transform(rgb))


# Transforms of timm and torchvision draw from the generators of the whole process; trainer.num_workers adds processes.
_one_at_a_time = threading.Lock()


def _seed_generators(*words: int) -> None:
    seed = int(np.random.SeedSequence(words).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """Inside, the generators of the process may be seeded; afterwards they are as before."""
    python, numpy, own = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(own)


@cache
def threads(process: int) -> ThreadPoolExecutor:
    """What opens images in a process, ``os.getpid()``."""
    # A process that is forked has its parent's pool, but not the pool's threads.
    return ThreadPoolExecutor(max_workers=min(32, os.cpu_count() or 1))
