"""Batches in parts, one for each process, so that several processes see what one process would see.

All draw the same batches. Of a training batch each takes a slice, whose loss counts by the share of the batch's targets
in it. In an evaluation a draw is a batch for each, and their outputs are gathered in the order of the examples.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather, pad_across_processes
from torch import Tensor, distributed, nn
from torch.utils.data import Dataset

from flora.launch import processes
from flora.tasks.base import COUNTS
from flora.training import frozen_norms
from flora.training.internals import BatchNorm


class Part(Dataset[dict[str, Tensor]]):
    """This process's part of everything that is drawn from a dataset that gathers whole batches.

    Args:
        dataset: which.
        each: examples in a part, the last ones may have fewer; None: as equal as can be.
    """

    def __init__(self, dataset: Any, each: int | None = None) -> None:
        self.dataset = dataset
        self.each = each

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The part of these examples; where it is empty, one of them that does not count: none may stand by."""
        if self.each is None:
            start, stop = (
                len(indices) * index // processes.count() for index in (processes.index(), processes.index() + 1)
            )
        else:
            start, stop = (self.each * index for index in (processes.index(), processes.index() + 1))
        own = indices[start:stop]
        batch = self.dataset.__getitems__(own or indices[:1])
        return batch | {COUNTS: torch.tensor(bool(own)) & batch.get(COUNTS, True)}


def synchronised(model: nn.Module) -> nn.Module:
    """The model, whose trained batch norms average over the examples of all processes, as one process would; on GPUs.

    Those that are frozen keep their statistics, and stay as they are.
    """
    frozen = frozen_norms.of(model)
    for name, norm in list(model.named_modules()):
        if isinstance(norm, BatchNorm) and norm not in frozen:
            whole = nn.SyncBatchNorm.convert_sync_batchnorm(norm)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, whole)
    return model


def undivided(loader: Any) -> Any:
    """Accelerate's loader, whose batches it was about to deal out, with every batch for every process."""
    dealer = loader.batch_sampler
    dealer.num_processes, dealer.process_index, dealer.even_batches = 1, 0, False
    return loader


def share(batch: dict[str, Tensor]) -> Tensor:
    """What the mean loss of a part counts: its share of the batch's targets, times the number of processes.

    Gradients and logged losses are averaged over the processes. A target of -100 is none, as losses have it.
    """
    own = (batch["labels"] != -100).sum() * batch.pop(COUNTS)
    total = own.clone()
    distributed.all_reduce(total)
    return own.double() * processes.count() / total


def joined(counts: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Parts of all processes in their order, without those that do not count; rows are filled up with -100."""
    sizes = processes.collected(len(tensors[0]) if counts else 0)
    whole = []
    for tensor in tensors:
        padded = pad_across_processes(pad_across_processes(tensor, dim=1, pad_index=-100), dim=0)
        parts = gather(padded).split(len(padded))
        whole.append(torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]))
    return tuple(whole)
