"""Texts as tokens, tokenised once and cached by content."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flora.errors import ConfigError, first_line
from flora.models.weights import cache_dir
from flora.tasks.text.dataset import as_tensor, starts_of

# Part of the cache's key: raised when the same text would be stored otherwise.
_LAYOUT = 1
_CHUNK = 10000


def tokenise(
    texts: Sequence[tuple[str, ...]], tokenizer: Any, max_length: int, keep: bool = True
) -> tuple[dict[str, Tensor], Tensor, int]:
    """Single texts or pairs as tokens, from the cache where the same texts were tokenised the same way before.

    Args:
        texts: tuples of one or two texts.
        tokenizer: of transformers.
        max_length: longer examples are cut, the longer text of a pair first.
        keep: in the cache.

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
    if keep and (stored := _stored(path)) is not None:
        return stored
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
    if keep:
        _store(path, tokens | {"starts": starts}, str(truncated))
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


def _stored(path: Path) -> tuple[dict[str, Tensor], Tensor, int] | None:
    """What ``_store`` wrote, or None where it is not there or damaged."""
    try:
        with safe_open(path, framework="pt") as stored:
            tensors, said = {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    if said.get("sha256") != _sum(tensors, said.get("truncated", "")):
        return None
    return tensors, tensors.pop("starts"), int(said["truncated"])


def _store(path: Path, tensors: dict[str, Tensor], truncated: str) -> None:
    """Best effort: a cache that cannot be written costs time, not results."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        save_file(tensors, temporary, {"truncated": truncated, "sha256": _sum(tensors, truncated)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        print(
            f"warning: {path.parent} cannot be written ({first_line(error)}): texts are tokenised anew each time; make "
            "room, or name another folder with FLORA_CACHE",
            file=sys.stderr,
        )


def _sum(tensors: dict[str, Tensor], truncated: str) -> str:
    whole = hashlib.sha256(truncated.encode())
    for name, tensor in sorted(tensors.items()):
        whole.update(repr([name, tensor.dtype, tensor.shape]).encode())
        whole.update(tensor.contiguous().numpy().data)
    return whole.hexdigest()
