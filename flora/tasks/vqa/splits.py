"""Conversations held out by image, and what can be answered without looking."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from flora.errors import DataError
from flora.tasks.base import draw
from flora.tasks.vqa.dialogues import Dialogue


def hold_out(dialogues: Sequence[Dialogue], size: int, seed: int) -> tuple[list[Dialogue], list[Dialogue]]:
    """The rest, and at least ``size`` drawn dialogues with all others about the same images; DataError if none is left.

    Those without an image stand for themselves, and images that one dialogue shows together stay together.
    """
    links: dict[int, int] = {}

    def group_of(image: int) -> int:
        while image in links:
            image = links[image]
        return image

    for dialogue in dialogues:
        for image in dialogue.images[1:]:
            if (own := group_of(image)) != (first := group_of(dialogue.images[0])):
                links[own] = first
    groups = [group_of(dialogue.images[0]) if dialogue.images else -1 - n for n, dialogue in enumerate(dialogues)]
    names = list(dict.fromkeys(groups))
    sizes, chosen, total = Counter(groups), set(), 0
    for i in draw(len(names), seed):
        if total >= size:
            break
        chosen.add(names[i])
        total += sizes[names[i]]
    rest = [dialogue for dialogue, group in zip(dialogues, groups, strict=True) if group not in chosen]
    if not rest:
        raise DataError(f"{len(dialogues)} conversations to train on, {size} to hold out (task.validation_size)")
    return rest, [dialogue for dialogue, group in zip(dialogues, groups, strict=True) if group in chosen]


def majority(train: Sequence[Dialogue], test: Sequence[Dialogue]) -> dict[str, Any]:
    """What is right without looking: the most frequent answer of train, and that to the same words.

    Returns:
        the ``answer``, the share of ``test`` questions that it answers, and the share that is answered ``by_question``:
        with the most frequent answer to each question's words in train, or that of all where they are new.
    """
    words: dict[str, Counter[str]] = defaultdict(Counter)
    for dialogue in train:
        words[dialogue.turns[-1][0]][dialogue.answers[0]] += 1
    ((answer, _),) = sum(words.values(), Counter[str]()).most_common(1)
    guessed = [words[q].most_common(1)[0][0] if q in words else answer for q in (d.turns[-1][0] for d in test)]
    right = np.array([dialogue.answers[0] for dialogue in test])
    shares = {"test": float(np.mean(right == answer)), "by_question": float(np.mean(right == np.array(guessed)))}
    return {"answer": answer} | shares
