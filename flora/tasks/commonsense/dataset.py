"""Questions to be answered, a batch of listed answers at a time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flora.tasks.base import Batch, draw
from flora.tasks.text.dataset import TextDataset, starts_of


class Choices(Dataset[Batch]):
    """Questions to be answered: every listed answer as a continuation to score, or the bare prompt to continue.

    Args:
        rows: the sequences; ``labels`` per token are -100 except on the answer.
        first: int64 ``[N + 1]``, which sequences belong to each question, and the end.
        right: int64 ``[N]``, the right answer.
    """

    def __init__(self, rows: TextDataset, first: Tensor, right: Tensor):
        self.rows = rows
        self.first = first
        self.right = right
        lengths = np.array(rows.lengths)
        self.lengths = [int(lengths[a:b].max()) for a, b in itertools.pairwise(first.tolist())]
        self.most = int(first.diff().max())

    def __len__(self) -> int:
        return len(self.right)

    def __getitem__(self, index: int) -> Batch:
        """A batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The right answers ``[B]``, and all sequences ``[M, L]`` with their place among the scores ``[B, most]``."""
        counts = self.first.diff()[torch.as_tensor(indices)]
        rows = [i for index in indices for i in range(int(self.first[index]), int(self.first[index + 1]))]
        sequences = self.rows.__getitems__(rows)
        columns = torch.cat([torch.arange(int(count)) for count in counts])
        places = torch.arange(len(indices)).repeat_interleave(counts) * self.most + columns
        targets = sequences.pop("labels")
        return {"labels": self.right[torch.as_tensor(indices)], **sequences, "targets": targets, "places": places} | {
            "most": torch.tensor(self.most)
        }

    def subset(self, count: int, seed: int = 0) -> Choices:
        """``count`` questions in their old order, drawn with ``seed``."""
        if count >= len(self):
            return self
        chosen = np.sort(draw(len(self), seed)[:count])
        sequences = [np.arange(int(self.first[i]), int(self.first[i + 1])) for i in chosen]
        rows = self.rows.take(np.concatenate(sequences))
        return Choices(rows, starts_of(map(len, sequences)), self.right[torch.from_numpy(chosen)])
