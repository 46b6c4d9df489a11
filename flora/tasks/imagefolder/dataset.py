"""Images that are opened when a batch asks for them, under transforms that draw alike wherever they run."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flora.errors import DataError
from flora.tasks.base import Batch
from flora.tasks.images.decode import as_rgb
from flora.tasks.images.lazy import LazyRows


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


class LazyImages(LazyRows):
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

    catalogue: Catalogue

    def __init__(
        self,
        catalogue: Catalogue,
        rows: np.ndarray,
        transform: Callable[[Image.Image], np.ndarray],
        draws: bool = False,
        skip: bool = False,
        once: bool = False,
    ):
        super().__init__(catalogue, rows, once)
        self.transform, self.draws, self.skip = transform, draws, skip

    @property
    def labels(self) -> np.ndarray:
        """Class indices ``[N]``."""
        return self.catalogue.labels[self.rows]

    def _decoding(self) -> contextlib.AbstractContextManager[None]:
        return _generators_kept() if self.draws else contextlib.nullcontext()

    def _batch(self, examples: Sequence[np.ndarray], rows: Sequence[int]) -> Batch:
        """``pixel_values`` uint8 ``[B, 3, H, W]`` and ``labels`` int64 ``[B]``."""
        return {
            "pixel_values": torch.from_numpy(np.stack(examples)),
            "labels": torch.from_numpy(self.catalogue.labels[list(rows)]),
        }

    def _name(self, row: int) -> str:
        return self.catalogue.names[row]

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
