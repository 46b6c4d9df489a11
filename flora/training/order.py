"""How examples of texts come: the order of those with images, and how far a batch is filled up."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from flora.errors import ConfigError


class ModalityOrder(Sampler[int]):
    """Batches of examples that all show images or all show none, those of a batch by falling length.

    As LLaVA's ``group_by_modality_length`` (llava/train/llava_trainer.py of github.com/haotian-liu/LLaVA): the last
    batches of both kinds come last, together.

    Args:
        lengths: tokens of each example.
        shows: whether each shows an image.
        batch: examples of an optimiser step.
        generator: of the order.
    """

    def __init__(self, lengths: Sequence[int], shows: Sequence[bool], batch: int, generator: torch.Generator) -> None:
        self.lengths, self.shows, self.batch, self.generator = lengths, shows, batch, generator

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        kinds = [[i for i, shown in enumerate(self.shows) if shown == kind] for kind in (True, False)]
        batches = [self._batches(indices) for indices in kinds if indices]
        last = [index for kind in batches for index in kind.pop()]  # perhaps not whole
        whole = [batch for kind in batches for batch in kind]
        for place in torch.randperm(len(whole), generator=self.generator).tolist():
            yield from whole[place]
        yield from last

    def _batches(self, indices: Sequence[int]) -> list[list[int]]:
        order = [indices[i] for i in torch.randperm(len(indices), generator=self.generator).tolist()]
        cuts = range(0, len(order), self.batch)
        return [sorted(order[i : i + self.batch], key=self.lengths.__getitem__, reverse=True) for i in cuts]


def padded_to(split: Any, multiple: int) -> Any:
    """A split of texts whose batches are as long as multiples of so many tokens; ConfigError for any other."""
    if not hasattr(split, "padded_to"):
        raise ConfigError("trainer.pad_to_multiple_of is for tasks of texts: leave it null")
    return split.padded_to(multiple)
