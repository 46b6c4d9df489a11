"""Conversations held out by image, and what can be answered without looking."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

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


def majority(
    train: Sequence[Dialogue], test: Sequence[Dialogue], score: Callable[[Sequence[str], Sequence[Dialogue]], float]
) -> dict[str, Any]:
    """What is right without looking: the most frequent answer of train, and that to the same words.

    Args:
        train: what is learnt from; empty: the most frequent answer is that of ``test`` itself.
        test: the questions that are asked.
        score: of answers to them, that by which models are compared.

    Returns:
        the ``answer``, its score on ``test``, of how many ``questions`` that is, and what answering ``by_question``
        gives: with the most frequent answer to each question's words in train, or that of all where they are new.
    """
    words: dict[str, Counter[str]] = defaultdict(Counter)
    for dialogue in train or test:
        words[dialogue.turns[-1][0]][dialogue.answers[0]] += 1
    ((answer, _),) = sum(words.values(), Counter[str]()).most_common(1)
    facts = {"answer": answer, "test": score([answer] * len(test), test), "questions": len(test)}
    if not train:
        return facts | {"of": "test"}
    guessed = [words[q].most_common(1)[0][0] if q in words else answer for q in (d.turns[-1][0] for d in test)]
    return facts | {"by_question": score(guessed, test)}
