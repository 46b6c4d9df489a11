"""Public benchmarks that LLaVA is tested on, read as they are published, asked and scored as LLaVA does.

Prompts, readings of answers and scores as in llava/eval and docs/Evaluation.md of github.com/haotian-liu/LLaVA. Each is
a test alone: a model that was trained on other data is evaluated on it.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flora.errors import DataError, first_line
from flora.tasks.vqa.answers import textvqa_accuracy, yes_no
from flora.tasks.vqa.dialogues import IMAGE, Dialogue, Pictures, kind_name, place_in

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
_CATEGORIES = ("random", "popular", "adversarial")
_PROMPTS = "llava_textvqa_val_v051_ocr.jsonl"
_SAYS_LETTER = re.compile(r"The answer is ([A-Z]).")  # any sign after it, as there


class Question(NamedTuple):
    """A question: its words, its image by the path in the folder of images, the right answers, its kind, its row."""

    text: str
    image: str
    answers: tuple[str, ...]
    kind: str
    where: str


@dataclass(frozen=True)
class Benchmark:
    """A test that others publish.

    Attributes:
        files: names of its files, all needed.
        further: of files that change how it is asked where they are there.
        images: folders of its images, the first that is there counts.
        metric: the one that is published.
        read: the questions in a folder that has the files.
        score: all metrics of written answers, in [0, 1].
    """

    files: tuple[str, ...]
    images: tuple[str, ...]
    metric: str
    read: Callable[[Path], Iterator[Question]]
    score: Callable[[Sequence[str], Sequence[Dialogue]], dict[str, float]]
    further: tuple[str, ...] = ()

    def paths(self, folder: Path) -> list[Path]:
        """Its files in a folder; DataError where some are missing."""
        if missing := [name for name in self.files if not (folder / name).is_file()]:
            raise DataError(f"{folder} lacks {', '.join(missing)}: docs/vqa.md says where each file comes from")
        return [folder / name for name in (*self.files, *self.further) if (folder / name).is_file()]

    def dialogues(self, folder: Path, images: Path, pictures: Pictures) -> list[Dialogue]:
        """Its questions as dialogues of one turn.

        Raises:
            DataError: files that are missing, or no files of this benchmark.
        """
        self.paths(folder)
        made = []
        try:
            for question in self.read(folder):
                place = place_in(images, question.image, pictures)
                turn = (f"{IMAGE}\n{question.text}", question.answers[0])
                made.append(Dialogue((turn,), (place,), question.answers, question.kind, question.where))
        except KeyError as error:
            raise DataError(f"{folder}: a question has no {error.args[0]}; fetch the files again") from error
        except (OSError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise DataError(f"{folder} cannot be read ({first_line(error)}); fetch the files again") from error
        if not made:
            raise DataError(f"{folder}: no questions; fetch the files again")
        return made


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name}: {first_line(error)}") from error


def _lines(path: Path) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line), f"{path}, line {number}"
            except ValueError as error:
                raise ValueError(f"{path.name}, line {number}: {first_line(error)}") from error


def _pope(folder: Path) -> Iterator[Question]:
    for category in _CATEGORIES:
        for row, where in _lines(folder / f"coco_pope_{category}.json"):
            if row["label"] not in ("yes", "no"):
                raise ValueError(f"{where}: label {row['label']!r} is neither yes nor no")
            yield Question(f"{row['text']}\n{SHORT}", row["image"], (row["label"],), category, where)


def _pope_scores(written: Sequence[str], asked: Sequence[Dialogue]) -> dict[str, float]:
    """``f1``, ``accuracy`` and ``yes_share``, each a mean over the categories, and those of each category."""
    parts: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for text, dialogue in zip(written, asked, strict=True):
        parts[dialogue.kind].append((text, dialogue.answers[0]))
    names = {"f1": "yes_no_f1", "accuracy": "yes_no_accuracy", "yes_share": "yes_share"}
    each = {kind: yes_no(*zip(*pairs, strict=True)) for kind, pairs in sorted(parts.items())}
    means = {ours: float(np.mean([values[name] for values in each.values()])) for ours, name in names.items()}
    return means | {f"{kind}_{ours}": values[name] for kind, values in each.items() for ours, name in names.items()}


def _scienceqa(folder: Path) -> Iterator[Question]:
    problems, splits = _json(folder / "problems.json"), _json(folder / "pid_splits.json")
    for name in splits["test"]:
        problem = problems[name]
        if not problem["image"]:
            continue
        hint = f"Context: {problem['hint']}\n" if problem.get("hint") else ""
        letters = string.ascii_uppercase[: len(problem["choices"])]
        choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, problem["choices"], strict=True))
        text = f"{hint}{problem['question']}\n{choices}\n{LETTER}"
        answer, kind = letters[problem["answer"]], kind_name(problem.get("subject", "other"))
        yield Question(text, f"{name}/{problem['image']}", (answer,), kind, f"{folder}/problems.json, {name}")


def letter_of(text: str) -> str | None:
    """The letter that an answer chooses: itself, at its front as in ``B. left``, or in ``The answer is B.``"""
    text = text.strip()
    if len(text) == 1 or text[1:3] == ". ":
        return text[0]
    said = _SAYS_LETTER.findall(text)
    return said[0] if len(said) == 1 else None


def _letter_scores(written: Sequence[str], asked: Sequence[Dialogue]) -> dict[str, float]:
    return _shares([letter_of(text) == d.answers[0] for text, d in zip(written, asked, strict=True)], asked)


def _gqa(folder: Path) -> Iterator[Question]:
    path = folder / "testdev_balanced_questions.json"
    for name, row in _json(path).items():
        kind = kind_name((row.get("types") or {}).get("structural") or "other")
        yield Question(
            f"{row['question']}\n{SHORT}", f"{row['imageId']}.jpg", (row["answer"],), kind, f"{path}, {name}"
        )


def _gqa_scores(written: Sequence[str], asked: Sequence[Dialogue]) -> dict[str, float]:
    """Equal to the answer, in small letters and without a full stop, as LLaVA hands answers in."""
    return _shares(
        [text.strip().rstrip(".").lower() == d.answers[0] for text, d in zip(written, asked, strict=True)], asked
    )


def _textvqa(folder: Path) -> Iterator[Question]:
    path = folder / "TextVQA_0.5.1_val.json"
    prompts = _textvqa_prompts(folder / _PROMPTS)
    for number, row in enumerate(_json(path)["data"]):
        given = Counter(row["answers"])
        answers = tuple(text for text, count in given.most_common() for _ in range(count))
        if len(answers) != 10:
            raise ValueError(f"question {row['question_id']} has {len(answers)} answers instead of ten")
        text = f"{row['question']}\n{SHORT}"
        if prompts:
            text = prompts[row["image_id"], row["question"].lower()]
        yield Question(text, f"{row['image_id']}.jpg", answers, "other", f"{path}, entry {number}")


def _textvqa_prompts(path: Path) -> dict[tuple[str, str], str]:
    """LLaVA's questions, which list words that were read in the image, by image and question."""
    if not path.is_file():
        return {}
    prompts = {}
    for row, _ in _lines(path):
        lines = row["text"].split("\n")
        question = lines[1] if lines[0].startswith("Reference OCR token:") else lines[0]
        prompts[row["question_id"], question.lower()] = row["text"]
    return prompts


def _textvqa_scores(written: Sequence[str], asked: Sequence[Dialogue]) -> dict[str, float]:
    each = [textvqa_accuracy(text, dialogue.answers) for text, dialogue in zip(written, asked, strict=True)]
    return {"vqa_accuracy": float(np.mean(each))}


def _shares(right: Sequence[bool], asked: Sequence[Dialogue]) -> dict[str, float]:
    kinds: dict[str, list[bool]] = defaultdict(list)
    for ok, dialogue in zip(right, asked, strict=True):
        kinds[dialogue.kind].append(ok)
    return {"accuracy": float(np.mean(right))} | {f"{k}_accuracy": float(np.mean(kinds[k])) for k in sorted(kinds)}


BENCHMARKS: Mapping[str, Benchmark] = {
    "pope": Benchmark(
        tuple(f"coco_pope_{name}.json" for name in _CATEGORIES), ("images", "val2014"), "f1", _pope, _pope_scores
    ),
    "scienceqa": Benchmark(
        ("problems.json", "pid_splits.json"), ("images/test", "test", "images"), "accuracy", _scienceqa, _letter_scores
    ),
    "gqa": Benchmark(("testdev_balanced_questions.json",), ("images",), "accuracy", _gqa, _gqa_scores),
    "textvqa": Benchmark(
        ("TextVQA_0.5.1_val.json",),
        ("train_images", "images"),
        "vqa_accuracy",
        _textvqa,
        _textvqa_scores,
        further=(_PROMPTS,),
    ),
}
