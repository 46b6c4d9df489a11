"""Questions with listed answers: the eight sets of LLM-Adapters in its words, and SST-2 for small models, in ours.

Hu et al. 2023, "LLM-Adapters", arXiv 2304.01933. Its training mix of the eight sets is commonsense_170k.json.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
    "                ### Instruction:\n                {instruction}\n\n                ### Response:\n                "
)
# Subspace-Tuning's CR_MR/finetune.py (made from LLM-Adapters') has another space here and fills an empty line; what
# evaluates, commonsense_evaluate.py of both, has not.
TRAINING_PROMPT = PROMPT.replace("request. ", "request.  ").replace(
    "{instruction}\n\n", "{instruction}\n                \n"
)
RESPONSE = "the correct answer is {answer}"
_LISTED = re.compile(r"Answer format: (\S+)\s*$")


@dataclass(frozen=True)
class Question:
    """An instruction, the answers it lists, and which of them is right."""

    instruction: str
    answers: tuple[str, ...]
    right: int


Row = Mapping[str, Any]


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a dataset without its files.

    Attributes:
        ask: a row of the original dataset as a question; KeyError for a missing column, ValueError for a wrong label.
        hub: its repository and configuration on the hub.
        folder: its name in LLM-Adapters' ``dataset`` folder.
        test: the split that results are reported on, as LLM-Adapters does.
        rows: official numbers of rows, train and test.
    """

    ask: Callable[[Row], Question]
    hub: tuple[str, str]
    folder: str
    test: str
    rows: tuple[int, int]


def _question(
    text: str, kind: str, options: Sequence[str], right: Any, between: str = " ", end: str = "\n\n"
) -> Question:
    """Numbered options, and the index of the right one."""
    names = tuple(f"{kind}{i + 1}" for i in range(len(options)))
    listed = between.join(f"{name.capitalize()}: {option}" for name, option in zip(names, options, strict=True))
    instruction = f"{text}\n\n{listed}{end}Answer format: {'/'.join(names)}"
    return Question(instruction, names, _index(right, len(names)))


def _index(value: Any, count: int) -> int:
    number = int(value)
    if not 0 <= number < count or number != float(value):
        raise ValueError(f"label {value} is outside 0..{count - 1}")
    return number


def _boolq(row: Row) -> Question:
    yes = _index(row["label"] if "label" in row else row["answer"], 2)
    text = f"Please answer the following question with true or false, question: {row['question']}?"
    return Question(f"{text}\n\nAnswer format: true/false", ("true", "false"), 1 - yes)


def with_passage(row: Row) -> Question:
    """BoolQ with the passage that holds the answer, which LLM-Adapters leaves out."""
    plain = _boolq(row)
    asked = plain.instruction.replace("Please answer", "After reading this passage, please answer", 1)
    return Question(f"Passage: {row['passage']}\n{asked}", plain.answers, plain.right)


def _piqa(row: Row) -> Question:
    text = f"Please choose the correct solution to the question: {row['goal']}"
    return _question(text, "solution", (row["sol1"], row["sol2"]), row["label"], between="\n\n")


def _siqa(row: Row) -> Question:
    text = f"Please choose the correct answer to the question: {row['context']} {row['question']}"
    return _question(text, "answer", [row[f"answer{letter}"] for letter in "ABC"], int(row["label"]) - 1)


def _hellaswag(row: Row) -> Question:
    text = f"Please choose the correct ending to complete the given sentence: {row['activity_label']}: {row['ctx']}"
    return _question(text, "ending", row["endings"], row["label"])


def _winogrande(row: Row) -> Question:
    text = f"Please choose the correct answer to fill in the blank to complete the given sentence: {row['sentence']}"
    return _question(text, "option", (row["option1"], row["option2"]), int(row["answer"]) - 1, end=" ")


def _sst2(row: Row) -> Question:
    positive = _index(row["label"], 2)
    text = f"Please say whether the sentence is positive or negative, sentence: {row['sentence'].strip()}"
    return Question(f"{text}\n\nAnswer format: positive/negative", ("positive", "negative"), 1 - positive)


def _choices(stem: str, row: Row) -> Question:
    """ARC and OpenBookQA: options with letters or numbers."""
    keys, text = list(row["choices"]["label"]), f"Please choose the correct answer to the question: {row[stem]}"
    if row["answerKey"] not in keys:
        raise ValueError(f"answerKey {row['answerKey']!r} is none of {keys}")
    return _question(text, "answer", row["choices"]["text"], keys.index(row["answerKey"]))


DATASETS = {
    "boolq": DatasetInfo(_boolq, ("google/boolq", "default"), "boolq", "validation", (9427, 3270)),
    "piqa": DatasetInfo(_piqa, ("ybisk/piqa", "plain_text"), "piqa", "validation", (16113, 1838)),
    "siqa": DatasetInfo(_siqa, ("allenai/social_i_qa", "default"), "social_i_qa", "validation", (33410, 1954)),
    "hellaswag": DatasetInfo(_hellaswag, ("Rowan/hellaswag", "default"), "hellaswag", "validation", (39905, 10042)),
    "winogrande": DatasetInfo(
        _winogrande, ("allenai/winogrande", "winogrande_xl"), "winogrande", "validation", (40398, 1267)
    ),
    "arc_e": DatasetInfo(
        partial(_choices, "question"), ("allenai/ai2_arc", "ARC-Easy"), "ARC-Easy", "test", (2251, 2376)
    ),
    "arc_c": DatasetInfo(
        partial(_choices, "question"), ("allenai/ai2_arc", "ARC-Challenge"), "ARC-Challenge", "test", (1119, 1172)
    ),
    "obqa": DatasetInfo(
        partial(_choices, "question_stem"), ("allenai/openbookqa", "main"), "openbookqa", "test", (4957, 500)
    ),
    "sst2": DatasetInfo(_sst2, ("nyu-mll/glue", "sst2"), "glue/sst2", "validation", (67349, 872)),
}
EIGHT = tuple(name for name in DATASETS if name != "sst2")
"""The sets of LLM-Adapters, which one model answers: ``task.dataset=all``."""


def usual_answers(train: Sequence[Question], asked: Sequence[Question]) -> list[int]:
    """For each question the answer that is most often right in training among those that list the same; else 0."""
    counted: dict[tuple[str, ...], Counter[int]] = {}
    for question in train:
        counted.setdefault(question.answers, Counter())[question.right] += 1
    most = {answers: min(rights, key=lambda i: (-rights[i], i)) for answers, rights in counted.items()}
    return [most.get(question.answers, 0) for question in asked]


def adapters_row(row: Row) -> Question:
    """A row of LLM-Adapters' JSON, whose instruction ends with the answers it lists."""
    listed = _LISTED.search(row["instruction"])
    answers = tuple(listed.group(1).split("/")) if listed else ()
    if row["answer"] not in answers:
        raise ValueError(f"answer {row['answer']!r} is none of {', '.join(answers) or 'those listed, there are none'}")
    return Question(row["instruction"], answers, answers.index(row["answer"]))
