"""Examples that are opened when a batch asks for them, by threads, without those that cannot be decoded."""

import contextlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from flora.errors import DataError
from flora.tasks.base import COUNTS, Batch, draw
from flora.tasks.images.decode import stand_in

_TRIED = 4  # rows of a batch at most, which tell whether threads pay
_SHORT = 2e-3  # seconds a row of these, below which they did not: photographs of some 300 pixels


class LazyRows(Dataset[Batch], ABC):
    """Rows of a catalogue, of which a batch is made when it is asked for.

    A row that cannot be decoded, and is skipped, is missing in its batch; where all are, the next that can be decoded
    stands in.

    Args:
        catalogue: what holds all rows; ``unreadable``, bool ``[N]``, says which turned out so.
        rows: which of them, int64 ``[N]``.
        once: whether each row counts once, as in an evaluation, so that one which stands in does not.

    """

    def __init__(self, catalogue: Any, rows: np.ndarray, once: bool) -> None:
        self.catalogue, self.rows, self.once = catalogue, rows, once
        self._moment = torch.zeros(2, dtype=torch.int64).share_memory_()  # with worker processes, as they stay

    @property
    def unreadable(self) -> Tensor:
        """Of all rows of the catalogue, which were met and could not be decoded."""
        return self.catalogue.unreadable

    @property
    def moment(self) -> tuple[int, int]:
        """Seed and epoch, on which random numbers depend beside the row."""
        seed, epoch = self._moment.tolist()
        return seed, epoch

    def begin_epoch(self, seed: int, epoch: int) -> None:
        """Say what random numbers depend on, beside the row."""
        self._moment.copy_(torch.tensor([seed, epoch]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        """One example."""
        return {name: value[0] for name, value in self.__getitems__([index]).items() if name != COUNTS}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A batch of these examples; DataError where one cannot be decoded and is not skipped, or none can."""
        rows = self.rows[list(indices)]
        with self._decoding():
            decoded = self._decoded(rows)
            kept = [(example, int(row)) for example, row in zip(decoded, rows, strict=True) if example is not None]
            instead = [] if kept else stand_in(indices[-1], len(self), self._readable)
        if kept:
            examples, whole = zip(*kept, strict=True)
            return self._batch(examples, whole)
        if instead:
            return self.__getitems__(instead) | ({COUNTS: torch.tensor(False)} if self.once else {})
        raise DataError(
            f"{self._name(rows[0])}, {len(rows) - 1} more of its batch and those after it: none can be decoded"
        )

    def concat(self, other: Self) -> Self:
        """Both after each other, as this one gives its examples; of one catalogue."""
        assert other.catalogue is self.catalogue
        return self._with(np.concatenate([self.rows, other.rows]))

    def subset(self, count: int, seed: int = 0) -> Self:
        """``count`` examples in their old order, drawn with ``seed``."""
        return self if count >= len(self) else self._with(self.rows[np.sort(draw(len(self), seed)[:count])])

    def _decoded(self, rows: np.ndarray) -> list[Any]:
        """Rows, decoded by threads where one takes so long that they help: they take turns at Python's own code."""
        first, began, short = [], time.perf_counter(), True
        for row in rows[:_TRIED]:
            first.append(self._decode(row))
            # One large image tells enough: a batch of four would never meet a thread.
            if not (short := time.perf_counter() - began < _SHORT * _TRIED):
                break
        rest = rows[len(first) :]
        return [*first, *(map(self._decode, rest) if short else threads(os.getpid()).map(self._decode, rest))]

    def _readable(self, index: int) -> bool:
        return self._decode(self.rows[index]) is not None

    def _decoding(self) -> contextlib.AbstractContextManager[None]:
        """Around the decoding of a batch."""
        return contextlib.nullcontext()

    @abstractmethod
    def _decode(self, row: int) -> Any:
        """One example; None for one that is skipped, which is noted. DataError for one that cannot be used."""

    @abstractmethod
    def _batch(self, examples: Sequence[Any], rows: Sequence[int]) -> Batch:
        """A batch of decoded examples and their rows."""

    @abstractmethod
    def _name(self, row: int) -> str:
        """What messages call a row."""

    @abstractmethod
    def _with(self, rows: np.ndarray) -> Self:
        """Other rows of the catalogue, given alike."""


@cache
def threads(process: int) -> ThreadPoolExecutor:
    """What opens images in a process, ``os.getpid()``."""
    # A process that is forked has its parent's pool, but not the pool's threads.
    beside = get_worker_info()
    return ThreadPoolExecutor(max_workers=max(1, min(32, os.cpu_count() or 1) // (beside.num_workers if beside else 1)))
