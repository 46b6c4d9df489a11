"""Questions as tokens: the prompt, then an answer, of which every token and the end are targets."""

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
    Question,
)
from flora.tasks.text.dataset import TextDataset, as_tensor, starts_of
from flora.tasks.text.tokenise import pad_or_end, tokenise


class Coder:
    """Questions as sequences for a tokenizer: the prompt, then an answer; only the answer and its end are targets.

    Args:
        tokenizer: of transformers.
        max_length: tokens; longer prompts lose their beginning.

    Attributes:
        truncated: how many prompts were cut, by split.
        warnings: for the record.

    Raises:
        ConfigError: the tokenizer has no token that ends a text.
    """

    def __init__(self, tokenizer: Any, max_length: int):
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no token that ends a text: name one in its tokenizer_config.json")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncated: dict[str, int] = {}
        self.warnings = ["no pad token: the end token pads"] if tokenizer.pad_token_id is None else []
        self._answers: dict[str, list[int]] = {}

    def answered(self, split: str, questions: Sequence[Question]) -> TextDataset:
        """One sequence a question, with its right answer."""
        return self._rows(split, questions, [(question.right,) for question in questions])

    def asked(self, split: str, questions: Sequence[Question]) -> Choices:
        """One sequence for each listed answer."""
        rows = self._rows(split, questions, [tuple(range(len(question.answers))) for question in questions])
        first = starts_of(len(question.answers) for question in questions)
        return Choices(rows, first, torch.tensor([question.right for question in questions]))

    def prompts(self, instructions: Sequence[str], reserved: int) -> TextDataset:
        """The prompts alone, with room for so many tokens; ``labels`` are their numbers."""
        tokens, starts, _ = tokenise(
            [(PROMPT.format(instruction=i),) for i in instructions], self.tokenizer, sys.maxsize, False
        )
        ids, lengths = array("i"), []
        for begin, end in pairwise(starts.tolist()):
            prompt = tokens["input_ids"][begin:end].tolist()
            if prompt[-1] == self.tokenizer.eos_token_id:
                prompt.pop()  # some tokenizers end every text
            prompt = prompt[-(self.max_length - reserved) :]
            ids.extend(prompt)
            lengths.append(len(prompt))
        padding = {"input_ids": pad_or_end(self.tokenizer)}
        numbers = {"labels": torch.arange(len(lengths))}
        return TextDataset({"input_ids": as_tensor(ids)}, starts_of(lengths), numbers, padding, left=True)

    def _rows(self, split: str, questions: Sequence[Question], wanted: Sequence[Sequence[int]]) -> TextDataset:
        prompts = [(PROMPT.format(instruction=question.instruction),) for question in questions]
        tokens, starts, _ = tokenise(prompts, self.tokenizer, sys.maxsize)
        ids, targets = array("i"), array("i")
        lengths: list[int] = []
        self.truncated[split] = 0
        for i, (question, chosen) in enumerate(zip(questions, wanted, strict=True)):
            prompt = tokens["input_ids"][starts[i] : starts[i + 1]].tolist()
            if prompt[-1] == self.tokenizer.eos_token_id:
                prompt.pop()  # some tokenizers end every text
            answers = [self._answer(answer) for answer in question.answers]
            room = self.max_length - max(map(len, answers))
            self.truncated[split] += len(prompt) > room
            for answer in (answers[c] for c in chosen):
                ids.extend(prompt[-room:] + answer)
                targets.extend([-100] * len(prompt[-room:]) + answer)
                lengths.append(len(prompt[-room:]) + len(answer))
        fields = {"input_ids": as_tensor(ids), "labels": as_tensor(targets)}
        padding = {"input_ids": pad_or_end(self.tokenizer), "labels": -100}
        return TextDataset(fields, starts_of(lengths), {}, padding, left=True)

    def _answer(self, answer: str) -> list[int]:
        if answer not in self._answers:
            text = RESPONSE.format(answer=answer)
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            self._answers[answer] = [*tokens, self.tokenizer.eos_token_id]
        return self._answers[answer]
