"""Conversations about images, read from their files: LLaVA's JSON, or parquet files of questions and answers."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from flora.errors import DataError, first_line
from flora.models.weights import sha256_of
from flora.tasks.images.decode import as_rgb, open_image
from flora.tasks.images.parquet import opener
from flora.tasks.text.rows import read_table, row_of

IMAGE = "<image>"
_SHAPES = ("circle", "rectangle", "triangle")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Dialogue:
    """Turns of questions and answers.

    Attributes:
        turns: at least one; ``IMAGE`` in a question stands for an image.
        images: indices of the images, in the order of their places.
        answers: to the last question, as people gave them; the most frequent one comes first.
        kind: of the last question.
        where: names its row for an error message.
        answer_first: whether it began with an answer, which is left out.
    """

    turns: tuple[tuple[str, str], ...]
    images: tuple[int, ...]
    answers: tuple[str, ...]
    kind: str
    where: str
    answer_first: bool = False


@dataclass
class Pictures:
    """Images that are opened when they are asked for, each known once.

    Attributes:
        openers: one function an image, that opens it.
        names: what messages call the images.
        places: index by what identifies an image.
        orientation: how images are turned, see ``as_rgb``.
    """

    openers: list[Callable[[], Image.Image]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    places: dict[Any, int] = field(default_factory=dict)
    orientation: str = "exif"

    def rgb(self, index: int) -> Image.Image:
        """A decoded image; DataError where it cannot be decoded."""
        return as_rgb(self.openers[index], self.names[index], self.orientation)

    def add(self, key: Any, name: str, open_image: Callable[[], Image.Image]) -> int:
        """The index of an image, which is new unless its key is known."""
        if key not in self.places:
            self.places[key] = len(self.openers)
            self.openers.append(open_image)
            self.names.append(name)
        return self.places[key]


@dataclass(frozen=True)
class Asked:
    """A row of a parquet file as a question."""

    question: str
    answers: tuple[str, ...]
    kind: str


def plain(row: Row) -> Asked:
    """Columns ``question``, ``answer`` or ``answers`` (texts, or structs as VQAv2's), perhaps a type."""
    answers = _answers(row)
    kinds = (row.get(name) for name in ("type", "answer_type", "question_type"))
    return Asked(_text(row, "question"), answers, kind_name(next(filter(None, kinds), None) or kind_of(answers[0])))


def easy_vqa(row: Row) -> Asked:
    """A question of easy-VQA; what it is about shows in the answer."""
    (answer,) = answers = _answers(row)
    kind = "yes_no" if answer in ("yes", "no") else "shape" if answer in _SHAPES else "color"
    return Asked(_text(row, "question"), answers, kind)


def nlvr(row: Row) -> Asked:
    """A statement of NLVR, which is true or false of its image."""
    label = row["label"]
    if label not in (0, 1):
        raise ValueError(f"label {label!r} is neither 0 nor 1")
    return Asked(f"{_text(row, 'sentence')} True or false?", ("true" if label else "false",), "true_false")


def kind_of(answer: str) -> str:
    """The kind of a question by its answer, as VQA's answer types: ``yes_no``, ``number`` or ``other``."""
    if answer.lower() in ("yes", "no"):
        return "yes_no"
    return "number" if answer.isdigit() else "other"


def kind_name(kind: Any) -> str:
    """A kind as a part of a metric's name."""
    return "_".join("".join(c if c.isalnum() else " " for c in str(kind).lower()).split())


def _text(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"column {column} holds {value!r} instead of a text")
    return value.strip()


def _answers(row: Row) -> tuple[str, ...]:
    column = next((name for name in ("answers", "answer", "multiple_choice_answer") if name in row), "answer")
    return most_frequent_first(column, row[column])


def most_frequent_first(column: str, value: Any) -> tuple[str, ...]:
    """The answers of a cell, a text or a list of texts or of VQAv2's structs; ValueError where one is no text."""
    given = value if isinstance(value, list) else [value]
    texts = [answer["answer"] if isinstance(answer, dict) else answer for answer in given]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"column {column} holds {value!r}; answers are texts, and an empty one teaches nothing")
    return tuple(text for text, count in Counter(map(str.strip, texts)).most_common() for _ in range(count))


def read_parquet(paths: Sequence[Path], ask: Callable[[Row], Asked], pictures: Pictures) -> list[Dialogue]:
    """Every row of the files as a dialogue of one turn about one image.

    Args:
        paths: files that follow each other.
        ask: a row without its image as a question; KeyError for a missing column, ValueError for a bad cell.
        pictures: where images are added.

    Raises:
        DataError: a file that is no parquet, lacks a column or rows, or has a cell that is no question or answer.
    """
    dialogues = []
    for path in paths:
        table = read_table(path)
        if "image" not in table.column_names:
            raise DataError(f"{path}: no column image (it has {', '.join(table.column_names)})")
        kind = table.schema.field("image").type
        if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
            raise DataError(
                f"{path}: column image is {kind}; it must be a struct with the field bytes (encoded images)"
            )
        for number, row in enumerate(table.drop_columns("image").to_pylist()):
            where = row_of(path, number)
            cell = table["image"][number].as_py() or {}
            image = pictures.add(cell.get("bytes") or cell.get("path") or where, where, opener(path.parent, cell))
            try:
                asked = ask(row)
            except KeyError as error:
                raise DataError(
                    f"{path}: no column {error.args[0]} (it has {', '.join(table.column_names)})"
                ) from error
            except ValueError as error:
                raise DataError(f"{where}: {first_line(error)}; mend the file") from error
            turns = ((f"{IMAGE}\n{asked.question}", asked.answers[0]),)
            dialogues.append(Dialogue(turns, (image,), asked.answers, asked.kind, where))
    if not dialogues:
        raise DataError(f"{paths[0]}: no rows; fetch the file again")
    return dialogues


def read_json(path: Path, images: Path, pictures: Pictures) -> list[Dialogue]:
    """LLaVA's format: a list of ``{id, image, conversations: [{from: human | gpt, value}, ...]}``.

    As in LLaVA's code, an answer before the first question is left out.

    Args:
        path: of the list; ``image`` is a path, or a list of them, or left out.
        images: the folder where those paths start.
        pictures: where images are added.

    Raises:
        DataError: no such list, or a row whose turns or images are not as they should be.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({first_line(error)}); fetch it again") from error
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path}: not a list of conversations, or an empty one; fetch it again")
    dialogues = []
    for number, row in enumerate(rows):
        where = f"{path}, entry {number}"
        try:
            if not isinstance(row, dict):
                raise ValueError(f"{type(row).__name__} instead of a conversation")
            where += f" (id {row['id']})" if row.get("id") is not None else ""
            turns, answer_first = _turns(row["conversations"])
            image = row.get("image") or []
            files = image if isinstance(image, list) else [image]
            if not all(isinstance(file, str) for file in files):
                raise ValueError(f"image {image!r} is neither a path nor a list of paths")
            holes = sum(question.count(IMAGE) for question, _ in turns)
            if holes != len(files):
                raise ValueError(f"{IMAGE} occurs {holes} times, but there are {len(files)} images")
            places = tuple(place_in(images, file, pictures) for file in files)
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: {first_line(error)}; mend the file") from error
        except KeyError as error:
            raise DataError(f"{where}: no key {error.args[0]}; mend the file") from error
        answer = turns[-1][1]
        kind = kind_name(row.get("type") or kind_of(answer))
        dialogues.append(Dialogue(turns, places, (answer,), kind, where, answer_first))
    return dialogues


def _turns(conversation: Sequence[Mapping[str, str]]) -> tuple[tuple[tuple[str, str], ...], bool]:
    """Questions with their answers, and whether an answer before them was left out."""
    speakers = [turn["from"] for turn in conversation]
    start = int(speakers[:1] == ["gpt"])
    asked = speakers[start:]
    if not asked or asked != ["human", "gpt"] * (len(asked) // 2):
        raise ValueError(f"turns must be human, gpt, human, gpt, ...; here they are {', '.join(speakers) or 'none'}")
    values = [turn["value"] for turn in conversation[start:]]
    texts = [value.strip() if isinstance(value, str) else "" for value in values]
    if not all(texts):
        raise ValueError(f"turn {start + texts.index('')} is {values[texts.index('')]!r} instead of a text")
    if any(IMAGE in answer for answer in texts[1::2]):
        raise ValueError(f"an answer contains {IMAGE}")
    return tuple(zip(map(_image_first, texts[::2]), texts[1::2], strict=True)), bool(start)


def _image_first(question: str) -> str:
    """LLaVA shows the image before the question, wherever the data has it."""
    count = question.count(IMAGE)
    return f"{IMAGE}\n" * count + question.replace(IMAGE, "").strip()


def place_in(folder: Path, file: str, pictures: Pictures) -> int:
    """The index of an image by its path in a folder; ValueError for one that leads out of it."""
    place = Path(os.path.normpath(folder / file))
    if not place.is_relative_to(os.path.normpath(folder)):
        raise ValueError(f"its image {file} leads out of {folder}")
    return pictures.add(place, str(place), partial(open_image, place))


def facts_of(paths: Sequence[Path], rows: int) -> dict[str, Any]:
    """What a record says of files: their checksums, and how many rows they have together."""
    return {path.name: {"sha256": sha256_of(path)} for path in paths} | {"rows": rows}
