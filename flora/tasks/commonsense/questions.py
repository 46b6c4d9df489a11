"""Questions with listed answers: the eight sets of LLM-Adapters in its words, read from their files.

Hu et al. 2023, "LLM-Adapters", arXiv 2304.01933. Its training mix of the eight sets is commonsense_170k.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flora.errors import DataError, first_line
from flora.models.weights import sha256_of
from flora.tasks.rows import row_of

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
    "                ### Instruction:\n                {instruction}\n\n                ### Response:\n                "
)
RESPONSE = "the correct answer is {answer}"
MIX = "commonsense_170k.json"
_LISTED = re.compile(r"Answer format: (\S+)\s*$")


@dataclass(frozen=True)
class Question:
    """An instruction, the answers it lists, and which of them is right."""

    instruction: str
    answers: tuple[str, ...]
    right: int


Row = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """One dataset.

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


def _choices(stem: str, row: Row) -> Question:
    """ARC and OpenBookQA: options with letters or numbers."""
    keys, text = list(row["choices"]["label"]), f"Please choose the correct answer to the question: {row[stem]}"
    if row["answerKey"] not in keys:
        raise ValueError(f"answerKey {row['answerKey']!r} is none of {keys}")
    return _question(text, "answer", row["choices"]["text"], keys.index(row["answerKey"]))


DATASETS = {
    "boolq": Entry(_boolq, ("google/boolq", "default"), "boolq", "validation", (9427, 3270)),
    "piqa": Entry(_piqa, ("ybisk/piqa", "plain_text"), "piqa", "validation", (16113, 1838)),
    "siqa": Entry(_siqa, ("allenai/social_i_qa", "default"), "social_i_qa", "validation", (33410, 1954)),
    "hellaswag": Entry(_hellaswag, ("Rowan/hellaswag", "default"), "hellaswag", "validation", (39905, 10042)),
    "winogrande": Entry(
        _winogrande, ("allenai/winogrande", "winogrande_xl"), "winogrande", "validation", (40398, 1267)
    ),
    "arc_e": Entry(partial(_choices, "question"), ("allenai/ai2_arc", "ARC-Easy"), "ARC-Easy", "test", (2251, 2376)),
    "arc_c": Entry(
        partial(_choices, "question"), ("allenai/ai2_arc", "ARC-Challenge"), "ARC-Challenge", "test", (1119, 1172)
    ),
    "obqa": Entry(
        partial(_choices, "question_stem"), ("allenai/openbookqa", "main"), "openbookqa", "test", (4957, 500)
    ),
}


class _Row(dict[str, Any]):
    """A row whose empty cells are errors."""

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if value is None:
            raise ValueError(f"column {key} is empty")
        return value


def ask_all(paths: Sequence[Path], ask: Callable[[Row], Question]) -> tuple[list[Question], dict[str, Any]]:
    """Every row of the files as a question, and rows and sha256 of each file."""
    questions: list[Question] = []
    facts: dict[str, Any] = {}
    for path in paths:
        rows = _read(path)
        for number, row in enumerate(rows):
            try:
                questions.append(ask(_Row(row)))
            except KeyError as error:
                raise DataError(f"{path}: no column {error.args[0]} (it has {', '.join(row)})") from error
            except (ValueError, TypeError) as error:
                raise DataError(f"{row_of(path, number)}: {first_line(error)}; mend the file") from error
        facts[path.name] = {"rows": len(rows), "sha256": sha256_of(path)}
    if not questions:
        raise DataError(f"{paths[0]}: no rows; fetch the file again")
    return questions, facts


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".json":
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
                raise ValueError("not a list of questions")
            return found
        return pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({first_line(error)}); fetch it again") from error


def adapters_row(row: Row) -> Question:
    """A row of LLM-Adapters' JSON, whose instruction ends with the answers it lists."""
    listed = _LISTED.search(row["instruction"])
    answers = tuple(listed.group(1).split("/")) if listed else ()
    if row["answer"] not in answers:
        raise ValueError(f"answer {row['answer']!r} is none of {', '.join(answers) or 'those listed, there are none'}")
    return Question(row["instruction"], answers, answers.index(row["answer"]))
