"""Exponential moving average of what is trained: evaluated, saved and kept in place of the last weights."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from flora.training.internals import approach
from flora.training.sharding import like, local, whole


class Ema(TrainerCallback):
    """Averages over optimiser steps: ``average = decay * average + (1 - decay) * weight``.

    Early on the decay is (1 + step) / (10 + step) where that is less, so that short runs forget their start.

    Args:
        model: whose trained parameters are averaged.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.averages: list[Tensor] = []

    def on_train_begin(self, args, state, control, **kwargs):
        """Start from the first weights."""
        self.averages = [p.detach().clone() for p in self.parameters]

    def on_step_end(self, args, state, control, **kwargs):
        """Take the step's weights in."""
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        with torch.no_grad():
            averages, weights = ([local(t.detach()) for t in tensors] for tensors in (self.averages, self.parameters))
            approach(averages, weights, 1 - decay)

    def on_train_end(self, args, state, control, **kwargs):
        """Keep the averages."""
        self._swap()
        self.averages = []

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"averages": [whole(average) for average in self.averages]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """From a checkpoint."""
        with torch.no_grad():
            for average, before in zip(self.averages, saved["averages"], strict=True):
                average.copy_(like(before, average))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has its averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.averages, strict=bool(self.averages)):
                kept = parameter.detach().clone()
                parameter.copy_(average)
                average.copy_(kept)
