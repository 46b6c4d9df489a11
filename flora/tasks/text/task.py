"""Tasks of texts: what all of them share."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flora.errors import ConfigError
from flora.models.spec import ModelSpec, TextSpec
from flora.tasks.base import Batch, Forward, Splits, Task


class TextTask(Task[TextSpec]):
    """Texts and a tokenizer; the network is called as transformers calls it, without labels."""

    @abstractmethod
    def load(self, *, tokenizer: Any, max_length: int, data_dir: Path | None) -> Splits:
        """``read`` by its parts.

        Args:
            tokenizer: of transformers.
            max_length: the most tokens the network takes.
            data_dir: the folder ``paths.data``, or None.
        """

    def accepts(self, model: ModelSpec) -> None:
        """See Task.accepts."""
        if model.kind == "image":
            raise ConfigError(f"model={model.name} reads images and cannot run task={self.name}: choose a text model")

    def read(self, model: TextSpec, data_dir: Path | None) -> Splits:
        """See Task.read."""
        return self.load(tokenizer=model.tokenizer(), max_length=model.max_length, data_dir=data_dir)

    def forward(self, model: TextSpec) -> Forward:
        """Classify."""
        return classify


def classify(module: nn.Module, batch: Batch, training: bool) -> tuple[Tensor, Tensor]:
    """Logits ``[B, C]`` of a transformers classifier, and the labels ``[B]``."""
    logits = module(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return logits, batch["labels"]
