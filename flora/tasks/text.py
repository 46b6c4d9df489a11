"""Text in memory: tokenised once and cached by content, padded batch by batch."""

from __future__ import annotations

import hashlib
import os
import tempfile
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from flora.errors import ConfigError
from flora.models.weights import cache_dir
from flora.tasks.base import Batch, Forward, Splits, Task, draw

# Part of the cache's key: raised when the same text would be stored otherwise.
_LAYOUT = 1
_CHUNK = 10000


class TextDataset(Dataset[Batch]):
    """Sequences of different lengths; a batch is as wide as its longest.

    Args:
        tokens: per field the values of all examples after each other, ``[T]``: ``input_ids`` and what else the model
            takes per token.
        starts: int64 ``[N + 1]``, where each example begins, and the end.
        values: per field one value an example, ``[N]``: ``labels``, unless they are per token.
        padding: per field of ``tokens`` what fills up a shorter example.
        left: fill up on the left, so that all examples of a batch end together.

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
    ):
        if any(len(flat) != starts[-1] for flat in tokens.values()) or any(
            len(value) != len(starts) - 1 for value in values.values()
        ):
            raise ValueError(f"fields do not fit {len(starts) - 1} examples of {int(starts[-1])} tokens")
        self.tokens = tokens
        self.starts = starts
        self.values = values
        self.padding = dict(padding)
        self.left = left
        self.lengths = starts.diff().tolist()

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
        return TextDataset(tokens, starts, values, self.padding, self.left)

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
        return TextDataset(tokens, starts, values, self.padding, self.left)


class TextTask(Task):
    """Texts and a tokenizer; the network is called as transformers calls it, without labels."""

    @abstractmethod
    def load(self, *, tokenizer: Any, max_length: int, data_dir: Path | None) -> Splits:
        """``load_for`` by its parts.

        Args:
            tokenizer: of transformers.
            max_length: the most tokens the network takes.
            data_dir: the folder ``paths.data``, or None.
        """

    def load_for(self, model: Any, data_dir: Path | None) -> Splits:
        """See Task.load_for."""
        if not hasattr(model, "tokenizer"):
            raise ConfigError(f"model={model.name} reads images and cannot run task={self.name}: choose a text model")
        return self.load(tokenizer=model.tokenizer(), max_length=model.max_length, data_dir=data_dir)

    def forward(self, model: Any) -> Forward:
        """Classify."""
        return classify


def classify(module: nn.Module, batch: Batch, training: bool) -> Tensor:
    """Logits ``[B, C]`` of a transformers classifier."""
    return module(**{name: value for name, value in batch.items() if name != "labels"}).logits


def tokenise(
    texts: Sequence[tuple[str, ...]], tokenizer: Any, max_length: int
) -> tuple[dict[str, Tensor], Tensor, int]:
    """Single texts or pairs as tokens, from the cache where the same texts were tokenised the same way before.

    Args:
        texts: tuples of one or two texts.
        tokenizer: of transformers.
        max_length: longer examples are cut, the longer text of a pair first.

    Returns:
        Fields per token and ``starts`` as ``TextDataset`` takes them, and the number of examples cut.

    Raises:
        ConfigError: the length leaves no room for words.
    """
    added = tokenizer.num_special_tokens_to_add(pair=len(texts[0]) > 1)
    if max_length <= added:  # tokenizers would cut nothing then
        raise ConfigError(f"task.max_length={max_length} must be above {added}, the tokens that mark where texts end")
    fields = [name for name in tokenizer.model_input_names if name != "attention_mask"]
    path = cache_dir() / "tokenised" / f"{_key(texts, fields, tokenizer, max_length)}.safetensors"
    try:
        with safe_open(path, framework="pt") as stored:
            found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            return found, found.pop("starts"), int(stored.metadata()["truncated"])
    except (OSError, SafetensorError):
        pass  # not there, or damaged
    flat: dict[str, array[int]] = {name: array("i") for name in fields}
    lengths: list[int] = []
    truncated = 0
    for start in range(0, len(texts), _CHUNK):
        rows, cut = _encode(texts[start : start + _CHUNK], tokenizer, fields, max_length)
        truncated += cut
        lengths += map(len, rows["input_ids"])
        for name in fields:
            for row in rows[name]:
                flat[name].extend(row)
    tokens = {name: as_tensor(values) for name, values in flat.items()}
    starts = starts_of(lengths)
    _store(path, tokens | {"starts": starts}, {"truncated": str(truncated)})
    return tokens, starts, truncated


def _encode(
    texts: Sequence[tuple[str, ...]], tokenizer: Any, fields: list[str], max_length: int
) -> tuple[dict[str, list[list[int]]], int]:
    """Fields of every text, and how many were cut."""
    encoded = tokenizer(*map(list, zip(*texts, strict=True)), add_special_tokens=True, verbose=False)
    rows = {name: list(encoded[name]) for name in fields}
    long = [i for i, ids in enumerate(rows["input_ids"]) if len(ids) > max_length]
    if long:
        pairs = map(list, zip(*[texts[i] for i in long], strict=True))
        shortened = tokenizer(*pairs, truncation="longest_first", max_length=max_length)
        for name in fields:
            for i, row in zip(long, shortened[name], strict=True):
                rows[name][i] = row
    return rows, len(long)


def as_tensor(values: array[int]) -> Tensor:
    """An int32 tensor ``[T]`` of an array of C integers, empty ones included."""
    return torch.from_numpy(np.array(values, np.int32))


def starts_of(lengths: Iterable[int]) -> Tensor:
    """Where examples of these lengths begin when they follow each other, and the end: int64 ``[N + 1]``."""
    return torch.tensor([0, *lengths]).cumsum(0)


def padding_of(tokenizer: Any, fields: Iterable[str]) -> dict[str, int]:
    """What fills up shorter examples: the pad token, its segment, the label that losses ignore.

    Raises:
        ConfigError: the tokenizer has no pad token.
    """
    if tokenizer.pad_token_id is None:
        raise ConfigError("the tokenizer has no pad token: name one of its tokens in its tokenizer_config.json")
    values = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id, "labels": -100}
    return {name: values.get(name, 0) for name in fields}


def pad_or_end(tokenizer: Any) -> int:
    """The pad token, or the end token where there is none: for networks that a mask hides it from."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def fingerprint(tokenizer: Any) -> str:
    """Sha256 of what a tokenizer does."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return hashlib.sha256(repr([type(tokenizer), sorted(tokenizer.get_vocab().items())]).encode()).hexdigest()
    fast.no_truncation()
    fast.no_padding()
    return hashlib.sha256(fast.to_str().encode()).hexdigest()


def _key(texts: Sequence[tuple[str, ...]], fields: list[str], tokenizer: Any, max_length: int) -> str:
    digest = hashlib.sha256(repr([_LAYOUT, fingerprint(tokenizer), fields, max_length, len(texts)]).encode())
    for example in texts:
        for text in example:
            raw = text.encode("utf-8", "surrogatepass")
            digest.update(len(raw).to_bytes(8, "big") + raw)
    return digest.hexdigest()


def _store(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    except OSError:
        pass  # a cache that cannot be written costs time, not results
