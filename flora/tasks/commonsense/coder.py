"""Questions as tokens: what is trained on, and what is asked."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from flora.errors import ConfigError
from flora.tasks.commonsense.dataset import Choices
from flora.tasks.commonsense.questions import (
    PROMPT,
    RESPONSE,
    TRAINING_PROMPT,
    Question,
)
from flora.tasks.text.dataset import TextDataset, as_tensor, starts_of
from flora.tasks.text.tokenise import pad_or_end, tokenise


class Coder:
    """Questions as sequences for a tokenizer, in one of two ways to train.

    On the ``answer``: the prompt, then the answer and its end, which alone are targets; long prompts lose their
    beginning. On the ``sequence``, as LLM-Adapters does: prompt and answer as one text of which every token is a
    target; long ones lose their end, and what is asked is not cut before the network's positions end.

    Args:
        tokenizer: of transformers.
        max_length: tokens of a sequence to train on.
        loss_on: ``answer`` or ``sequence``.
        asked_length: tokens of what is asked; None: ``max_length``.

    Attributes:
        truncated: how many questions were cut, by split.
        warnings: for the record.

    Raises:
        ConfigError: the tokenizer has no token that ends a text.
    """

    def __init__(self, tokenizer: Any, max_length: int, loss_on: str = "answer", asked_length: int | None = None):
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no token that ends a text: name one in its tokenizer_config.json")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.loss_on = loss_on
        self.asked_length = asked_length or max_length
        self.truncated: dict[str, int] = {}
        self.warnings = ["no pad token: the end token pads"] if tokenizer.pad_token_id is None else []
        self._answers: dict[str, list[int]] = {}

    def answered(self, split: str, questions: Sequence[Question]) -> TextDataset:
        """One sequence a question, with its right answer."""
        if self.loss_on == "sequence":
            return self._whole(split, questions)
        rights = [(question.right,) for question in questions]
        return self._rows(split, questions, rights, self.max_length)

    def asked(
        self, split: str, questions: Sequence[Question], usual: Sequence[int], sets: Sequence[int] | None = None
    ) -> Choices:
        """One sequence for each listed answer; ``usual`` and ``sets`` as in ``Choices``, which may be written to."""
        every = [tuple(range(len(question.answers))) for question in questions]
        rows = self._rows(split, questions, every, self.asked_length)
        first = starts_of(len(question.answers) for question in questions)
        right = torch.tensor([question.right for question in questions])
        return Choices(rows, first, right, torch.tensor(usual), None if sets is None else torch.tensor(sets))

    def prompts(self, instructions: Sequence[str], reserved: int) -> TextDataset:
        """The prompts alone, with room for so many tokens; ``labels`` are their numbers."""
        tokens, starts, _ = tokenise(
            [(PROMPT.format(instruction=i),) for i in instructions], self.tokenizer, sys.maxsize, False
        )
        ids, lengths = array("i"), []
        for begin, end in pairwise(starts.tolist()):
            prompt = self._open(tokens["input_ids"][begin:end].tolist())[-(self.asked_length - reserved) :]
            ids.extend(prompt)
            lengths.append(len(prompt))
        padding = {"input_ids": pad_or_end(self.tokenizer)}
        numbers = {"labels": torch.arange(len(lengths))}
        return TextDataset({"input_ids": as_tensor(ids)}, starts_of(lengths), numbers, padding, left=True)

    def _whole(self, split: str, questions: Sequence[Question]) -> TextDataset:
        """Prompt and answer as one text, of which every token is a target, and the end where there is room for it."""
        texts = [
            (TRAINING_PROMPT.format(instruction=q.instruction) + RESPONSE.format(answer=q.answers[q.right]),)
            for q in questions
        ]
        tokens, starts, _ = tokenise(texts, self.tokenizer, sys.maxsize)
        ids, targets, lengths = array("i"), array("i"), []
        self.truncated[split] = 0
        for begin, end in pairwise(starts.tolist()):
            row = [*self._open(tokens["input_ids"][begin:end].tolist()), self.tokenizer.eos_token_id]
            self.truncated[split] += len(row) > self.max_length
            row = row[: self.max_length]
            ids.extend(row)
            targets.extend([-100, *row[1:]])  # nothing comes before the first
            lengths.append(len(row))
        return self._dataset(ids, targets, lengths)

    def _rows(
        self, split: str, questions: Sequence[Question], wanted: Sequence[Sequence[int]], longest: int
    ) -> TextDataset:
        prompts = [(PROMPT.format(instruction=question.instruction),) for question in questions]
        tokens, starts, _ = tokenise(prompts, self.tokenizer, sys.maxsize)
        ids, targets = array("i"), array("i")
        lengths: list[int] = []
        self.truncated[split] = 0
        for i, (question, chosen) in enumerate(zip(questions, wanted, strict=True)):
            prompt = self._open(tokens["input_ids"][starts[i] : starts[i + 1]].tolist())
            answers = [self._answer(answer) for answer in question.answers]
            room = longest - max(map(len, answers))
            self.truncated[split] += len(prompt) > room
            for answer in (answers[c] for c in chosen):
                ids.extend(prompt[-room:] + answer)
                targets.extend([-100] * len(prompt[-room:]) + answer)
                lengths.append(len(prompt[-room:]) + len(answer))
        return self._dataset(ids, targets, lengths)

    def _dataset(self, ids: array[int], targets: array[int], lengths: Sequence[int]) -> TextDataset:
        fields = {"input_ids": as_tensor(ids), "labels": as_tensor(targets)}
        padding = {"input_ids": pad_or_end(self.tokenizer), "labels": -100}
        return TextDataset(fields, starts_of(lengths), {}, padding, left=True)

    def _open(self, tokens: list[int]) -> list[int]:
        """A text without the end that some tokenizers put to every text."""
        return tokens[:-1] if tokens[-1] == self.tokenizer.eos_token_id else tokens

    def _answer(self, answer: str) -> list[int]:
        if answer not in self._answers:
            text = RESPONSE.format(answer=answer)
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            self._answers[answer] = [*tokens, self.tokenizer.eos_token_id]
        return self._answers[answer]
