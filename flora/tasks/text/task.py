"""Tasks of texts: what all of them share."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flora.errors import ConfigError
from flora.models.spec import ModelSpec, TextSpec
from flora.tasks.base import Batch, Forward, Split, Splits, Task
from flora.tasks.text.dataset import TextDataset
from flora.tasks.text.tokenise import padding_of, tokenise


class TextTask(Task[TextSpec]):
    """Texts and a tokenizer; the network is called as transformers calls it, without labels.

    Attributes:
        max_length: tokens; None: what the model takes.
        text_columns: names of the texts of an example.
    """

    max_length: int | None = None
    text_columns: tuple[str, ...] = ("text",)

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

    def unlabelled(self, model: TextSpec, inputs: Sequence[Any]) -> Split:
        """Texts, or tuples of them in the order of ``text_columns``; longer ones are cut, which is said."""
        tokenizer = model.tokenizer()
        longest = min(model.max_length, self.max_length or model.max_length)
        tokens, starts, cut = tokenise(self._texts(inputs), tokenizer, longest, keep=False)
        if cut:
            print(f"{cut} of {len(inputs)} inputs are longer than {longest} tokens and were cut", file=sys.stderr)
        return TextDataset(tokens, starts, {"labels": torch.arange(len(inputs))}, padding_of(tokenizer, tokens))

    def _texts(self, inputs: Sequence[Any]) -> list[tuple[str, ...]]:
        rows = [(value,) if isinstance(value, str) else value for value in inputs]
        for number, row in enumerate(rows):
            is_row = isinstance(row, tuple) and all(isinstance(text, str) for text in row)
            if not is_row or len(row) != len(self.text_columns):
                what = (
                    "a text" if len(self.text_columns) == 1 else f"({', '.join(self.text_columns)}), a tuple of texts"
                )
                raise ConfigError(f"input {number} is {inputs[number]!r:.60}: task={self.name} takes {what}")
        return rows

    def preprocessing(self, model: TextSpec) -> dict[str, Any]:
        """See Task.preprocessing."""
        longest = min(model.max_length, self.max_length or model.max_length)
        return {"max_length": longest, "texts": list(self.text_columns)}

    def forward(self, model: TextSpec) -> Forward:
        """Classify."""
        return classify


def classify(module: nn.Module, batch: Batch, training: bool) -> tuple[Tensor, Tensor]:
    """Logits ``[B, C]`` of a transformers classifier, and the labels ``[B]``."""
    logits = module(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return logits, batch["labels"]
