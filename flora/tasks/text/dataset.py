"""Text in memory: sequences of tokens, padded batch by batch."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flora.errors import ConfigError
from flora.tasks.base import Batch, draw


class TextDataset(Dataset[Batch]):
    """Sequences of different lengths; a batch is as wide as its longest.

    Args:
        tokens: per field the values of all examples after each other, ``[T]``: ``input_ids`` and what else the model
            takes per token.
        starts: int64 ``[N + 1]``, where each example begins, and the end.
        values: per field one value an example, ``[N]``: ``labels``, unless they are per token.
        padding: per field of ``tokens`` what fills up a shorter example.
        left: fill up on the left, so that all examples of a batch end together.
        multiple: a batch is as wide as a multiple of so many tokens, or as the longest example of all.

    Raises:
        ValueError: fields of other lengths than ``starts`` says.
    """

    def __init__(
        self,
        tokens: dict[str, Tensor],
        starts: Tensor,
        values: dict[str, Tensor],
        padding: Mapping[str, int],
        left: bool = False,
        multiple: int = 1,
    ):
        if any(len(flat) != starts[-1] for flat in tokens.values()) or any(
            len(value) != len(starts) - 1 for value in values.values()
        ):
            raise ValueError(f"fields do not fit {len(starts) - 1} examples of {int(starts[-1])} tokens")
        self.tokens = tokens
        self.starts = starts
        self.values = values
        self.padding = dict(padding)
        self.left, self.multiple = left, multiple
        self.lengths = starts.diff().tolist()
        self._longest = max(self.lengths, default=0)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Batch:
        """One example, without padding."""
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch: fields per token ``[B, L]`` with an ``attention_mask``, fields per example ``[B]``."""
        chosen = torch.as_tensor(indices)
        begins, ends = self.starts[chosen], self.starts[chosen + 1]
        width = int((ends - begins).max())
        if self.multiple > 1:
            width = min(-(-width // self.multiple) * self.multiple, self._longest)
        places = torch.arange(width) + (ends - width if self.left else begins)[:, None]
        inside = (places >= begins[:, None]) & (places < ends[:, None])
        places = torch.where(inside, places, 0)
        batch = {
            name: torch.where(inside, flat[places].long(), self.padding[name]) for name, flat in self.tokens.items()
        }
        return batch | {"attention_mask": inside.long()} | {n: value[chosen] for n, value in self.values.items()}

    def concat(self, other: TextDataset) -> TextDataset:
        """Both after each other, copied; ConfigError for a validation split of another kind."""
        if not isinstance(other, TextDataset):
            raise ConfigError("protocol.final_train: this task cannot train on its validation split; set it to train")
        starts = torch.cat([self.starts, other.starts[1:] + self.starts[-1]])
        tokens = {name: torch.cat([flat, other.tokens[name]]) for name, flat in self.tokens.items()}
        values = {name: torch.cat([value, other.values[name]]) for name, value in self.values.items()}
        return TextDataset(tokens, starts, values, self.padding, self.left, self.multiple)

    def padded_to(self, multiple: int) -> TextDataset:
        """The same examples in batches of such widths."""
        return TextDataset(self.tokens, self.starts, self.values, self.padding, self.left, multiple)

    def subset(self, count: int, seed: int = 0) -> TextDataset:
        """``count`` examples in their old order, drawn with ``seed``."""
        if count >= len(self):
            return self
        return self.take(np.sort(draw(len(self), seed)[:count]))

    def take(self, rows: np.ndarray) -> TextDataset:
        """The examples of these rows, in their order."""
        chosen = torch.from_numpy(rows)
        lengths = self.starts.diff()[chosen]
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        places = torch.arange(int(starts[-1])) + (self.starts[chosen] - starts[:-1]).repeat_interleave(lengths)
        tokens = {name: flat[places] for name, flat in self.tokens.items()}
        values = {name: value[chosen] for name, value in self.values.items()}
        return TextDataset(tokens, starts, values, self.padding, self.left, self.multiple)


def as_tensor(values: array[int]) -> Tensor:
    """An int32 tensor ``[T]`` of an array of C integers, empty ones included."""
    return torch.from_numpy(np.array(values, np.int32))


def starts_of(lengths: Iterable[int]) -> Tensor:
    """Where examples of these lengths begin when they follow each other, and the end: int64 ``[N + 1]``."""
    return torch.tensor([0, *lengths]).cumsum(0)
