"""Conversations about images as tokens: images expanded, the loss on answers, long texts cut to what a model takes."""

from __future__ import annotations

import bisect
import itertools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flora.errors import ConfigError, DataError
from flora.models.chat import Place
from flora.models.spec import ImageTextSpec
from flora.tasks.text.dataset import TextDataset, as_tensor, starts_of
from flora.tasks.text.tokenise import pad_or_end
from flora.tasks.vqa.dialogues import IMAGE, Dialogue

_CHUNK = 1000  # conversations tokenised at a time


@dataclass(frozen=True)
class _Encoded:
    """A conversation as tokens, its images expanded.

    Attributes:
        ids: all tokens.
        targets: the same where the loss is, else -100.
        turns: per turn the tokens up to the end of its question, to the beginning of its answer, and to its end.
    """

    ids: list[int]
    targets: list[int]
    turns: list[tuple[int, int, int]]


class Coder:
    """Dialogues as sequences for a model: in its words, with the loss on answers and the token that ends them.

    Args:
        model: whose tokens and chat they are.
        max_length: tokens; None: as many as the model takes.
        max_new_tokens: room that is left where an answer is to be written.

    Attributes:
        truncated: how many texts were cut, by split.
    """

    def __init__(self, model: ImageTextSpec, max_length: int | None, max_new_tokens: int):
        self.tokenizer = model.tokenizer()
        self.chat = model.chat
        self.image_id, self.image_tokens = model.image_id, model.image_tokens
        self.max_length = min(max_length or model.max_length, model.max_length)
        if max_new_tokens >= self.max_length:
            raise ConfigError(f"task.max_new_tokens={max_new_tokens} must be below {self.max_length}, the longest text")
        self.max_new_tokens = max_new_tokens
        self.end = self.chat.end_token(self.tokenizer)
        pad = pad_or_end(self.tokenizer)  # that of Vicuna is <unk>, which stands for images
        self.pad = self.end if self.tokenizer.pad_token_id is None or pad == self.image_id else pad
        self.truncated: dict[str, int] = {}
        self.warnings = ["no pad token: the end token pads"] if self.tokenizer.pad_token_id is None else []
        self._image = self.tokenizer.convert_ids_to_tokens(self.image_id)

    def answered(self, split: str, dialogues: Sequence[Dialogue]) -> TextDataset:
        """Sequences to learn from: ``labels`` per token, -100 except on answers."""
        return self._rows(split, dialogues, [dialogue.turns for dialogue in dialogues], 0)

    def asked(self, split: str, dialogues: Sequence[Dialogue], first: int) -> TextDataset:
        """Sequences that end where the last answer begins; ``labels`` count from ``first``."""
        open_turns: list[Any] = [(*dialogue.turns[:-1], (dialogue.turns[-1][0], None)) for dialogue in dialogues]
        rows = self._rows(split, dialogues, open_turns, self.max_new_tokens)
        numbers = {"labels": torch.arange(first, first + len(dialogues))}
        return TextDataset({"input_ids": rows.tokens["input_ids"]}, rows.starts, numbers, rows.padding, left=True)

    def answer(self, dialogue: Dialogue) -> list[int]:
        """The tokens of the last answer and its end."""
        turns = [(question.replace(IMAGE, ""), answer) for question, answer in dialogue.turns[-1:]]
        (encoded,) = self._encode([turns], [0], [dialogue.where])
        return [target for target in encoded.targets if target != -100]

    def decode(self, tokens: np.ndarray) -> str:
        """The text of written tokens up to their end; negative ones are padding."""
        kept = [int(token) for token in tokens if token >= 0]
        kept = kept[: kept.index(self.end)] if self.end in kept else kept
        return self.tokenizer.decode(kept, skip_special_tokens=True).strip()

    def _rows(self, split: str, dialogues: Sequence[Dialogue], turns: Sequence[Any], reserved: int) -> TextDataset:
        ids, targets, lengths = array("i"), array("i"), []
        self.truncated[split] = 0
        images, places = [len(dialogue.images) for dialogue in dialogues], [dialogue.where for dialogue in dialogues]
        for encoded, dialogue in zip(self._encode(turns, images, places), dialogues, strict=True):
            short = self._fitted(encoded, self.max_length - reserved, dialogue.where)
            self.truncated[split] += len(short.ids) < len(encoded.ids)
            ids.extend(short.ids)
            targets.extend(short.targets)
            lengths.append(len(short.ids))
        fields = {"input_ids": as_tensor(ids), "labels": as_tensor(targets)}
        return TextDataset(fields, starts_of(lengths), {}, {"input_ids": self.pad, "labels": -100}, left=True)

    def _encode(self, turns: Sequence[Any], images: Sequence[int], where: Sequence[str]) -> Iterator[_Encoded]:
        options = {"return_offsets_mapping": True, "verbose": False}
        for start in range(0, len(turns), _CHUNK):
            written = [
                self.chat.write([(self._question(question), answer) for question, answer in some])
                for some in turns[start : start + _CHUNK]
            ]
            tokens = self.tokenizer([text for text, _ in written], **options)
            rows = zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
            for number, (row, offsets) in enumerate(rows):
                if row.count(self.image_id) != images[start + number]:
                    raise DataError(
                        f"{where[start + number]}: its text contains {IMAGE} or {self._image}, which stands for "
                        "an image; take it out"
                    )
                yield self._expanded(row, [end for _, end in offsets], written[number][1])

    def _question(self, text: str) -> str:
        return text.replace(IMAGE, self._image) if self.chat.asks else self._image * text.count(IMAGE)

    def _expanded(self, row: Sequence[int], ends: Sequence[int], places: Sequence[Place]) -> _Encoded:
        """Tokens that end at these characters, each image as many as it takes; what ends in an answer is a target."""
        sizes = [self.image_tokens if token == self.image_id else 1 for token in row]
        begins = [0, *itertools.accumulate(sizes)]
        ids = [token for token, size in zip(row, sizes, strict=True) for _ in range(size)]
        targets = [-100] * len(ids)
        turns = []
        for place in places:
            question, answer, end = (begins[bisect.bisect_right(ends, limit)] for limit in place)
            targets[answer:end] = ids[answer:end]
            turns.append((question, answer, end))
        return _Encoded(ids, targets, turns)

    def _fitted(self, encoded: _Encoded, room: int, where: str) -> _Encoded:
        """At most ``room`` tokens: without its last turns, then with the longer of question and answer cut at its end.

        A conversation whose last answer is to be written loses no turn.
        """
        if len(encoded.ids) <= room:
            return encoded
        ids, targets, turns = encoded.ids, encoded.targets, encoded.turns
        is_open = turns[-1][1] == turns[-1][2]
        while len(turns) > 1 and not is_open and turns[-1][2] > room and self.image_id not in ids[turns[-2][2] :]:
            turns = turns[:-1]
        question, answer, end = turns[-1]
        if end <= room:
            return _Encoded(ids[:end], targets[:end], turns)
        begin = turns[-2][2] if len(turns) > 1 else 0
        last_image = max((i + 1 for i in range(question) if ids[i] == self.image_id), default=0)
        first_word = max(begin, last_image)
        free = room - first_word - (answer - question)
        if free < 1:
            raise DataError(
                f"{where}: {first_word} tokens of images and earlier turns do not fit into {room}; images are never "
                "cut: raise task.max_length, or lower model.image_size"
            )
        kept_answer = min(end - answer, max(free - (question - first_word), (free + 1) // 2))
        cut = first_word + free - kept_answer
        kept = [*range(cut), *range(question, answer + kept_answer)]
        return _Encoded([ids[i] for i in kept], [targets[i] for i in kept], turns)
