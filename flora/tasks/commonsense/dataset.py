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
        usual: int64 ``[N]``, the answer that training questions with the same listed answers have most often.
        sets: int64 ``[N]``, of which set a question is; None: there is one set.
        answered: one sequence a question as training has them, to measure the loss on; None: it is not measured.
    """

    def __init__(
        self,
        rows: TextDataset,
        first: Tensor,
        right: Tensor,
        usual: Tensor,
        sets: Tensor | None = None,
        answered: TextDataset | None = None,
    ):
        self.rows = rows
        self.first = first
        self.right = right
        self.usual = usual
        self.sets = sets
        self.answered = answered
        lengths = np.array(rows.lengths)
        self.lengths = [int(lengths[a:b].max()) for a, b in itertools.pairwise(first.tolist())]
        self.most = int(first.diff().max())

    def __len__(self) -> int:
        return len(self.right)

    def __getitem__(self, index: int) -> Batch:
        """A batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The right answers, and all sequences ``[M, L]`` with their place among the scores ``[B, most]``.

        ``labels`` are ``[B]``, or ``[B, 2]`` with the set. Names of the fields of ``answered`` begin with it.
        """
        counts = self.first.diff()[torch.as_tensor(indices)]
        rows = [i for index in indices for i in range(int(self.first[index]), int(self.first[index + 1]))]
        sequences = self.rows.__getitems__(rows)
        columns = torch.cat([torch.arange(int(count)) for count in counts])
        places = torch.arange(len(indices)).repeat_interleave(counts) * self.most + columns
        targets = sequences.pop("labels")
        chosen = torch.as_tensor(indices)
        labels = self.right[chosen]
        if self.sets is not None:
            labels = torch.stack([labels, self.sets[chosen]], 1)
        answered = {} if self.answered is None else self.answered.__getitems__(indices)
        return {
            **{"labels": labels, "usual": self.usual[chosen], **sequences, "targets": targets, "places": places},
            **{f"answered_{name}": value for name, value in answered.items()},
            "most": torch.tensor(self.most),
        }

    def with_answers(self, answered: TextDataset) -> Choices:
        """The same questions, each with its sequence of training."""
        return Choices(self.rows, self.first, self.right, self.usual, self.sets, answered)

    def subset(self, count: int, seed: int = 0) -> Choices:
        """``count`` questions in their old order, drawn with ``seed``."""
        if count >= len(self):
            return self
        chosen = np.sort(draw(len(self), seed)[:count])
        sequences = [np.arange(int(self.first[i]), int(self.first[i + 1])) for i in chosen]
        rows, kept = self.rows.take(np.concatenate(sequences)), torch.from_numpy(chosen)
        sets = None if self.sets is None else self.sets[kept]
        answered = None if self.answered is None else self.answered.take(chosen)
        return Choices(rows, starts_of(map(len, sequences)), self.right[kept], self.usual[kept], sets, answered)
