"""Questions about images as rows of a table of a user's own, which names a file for each image."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flora.errors import DataError, first_line
from flora.tasks import tables
from flora.tasks.vqa.dialogues import (
    IMAGE,
    Dialogue,
    Pictures,
    kind_name,
    kind_of,
    most_frequent_first,
    place_in,
)

_IMAGES = ("image", "image_name", "img_name", "image_path", "image_file", "file_name", "filename", "img", "image_id")
_QUESTIONS = ("question", "questions", "query")
_ANSWERS = ("answers", "answer", "multiple_choice_answer")
_KINDS = ("type", "answer_type", "question_type")


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are what; None: by usual names."""

    image: str | None = None
    question: str | None = None
    answer: str | None = None

    def of_inputs(self, table: tables.Table) -> tuple[str, str]:
        """The columns of the image and of the question; ConfigError where one is not there."""
        image = tables.column(table, "task.image", self.image, _IMAGES)
        return image, tables.column(table, "task.question", self.question, _QUESTIONS)


def are_rows(path: Path, columns: Columns) -> bool:
    """Whether a file has rows that name images: not LLaVA's conversations, nor parquet with the images in it."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            schema = pq.read_schema(path)
            image = columns.image or tables.usual_column(schema.names, _IMAGES)
            return image in schema.names and schema.field(image).type in (pa.string(), pa.large_string())
        if suffix == ".json":
            with path.open(encoding="utf-8-sig") as stream:
                head = stream.read(1 << 20)
            return '"conversations"' not in head and f'"{columns.question or "question"}' in head
    except (pa.ArrowException, OSError, ValueError):
        return False  # whoever reads it says what is wrong
    return True


def read_rows(paths: Sequence[Path], columns: Columns, images: Path, suffix: str, pictures: Pictures) -> list[Dialogue]:
    """Every row of tables as a dialogue of one turn about the image that it names.

    Args:
        paths: files that follow each other, as ``flora.tasks.tables`` reads them.
        columns: which are what; answers are a text, a list of texts, or such a list written as JSON.
        images: the folder where names of images start; they may not lead out of it.
        suffix: what follows every question, perhaps nothing.
        pictures: where images are added.

    Raises:
        ConfigError: a column that is not there.
        DataError: a file that cannot be read, or a row without an image, a question or an answer.
    """
    table = tables.read(paths)
    image, question = columns.of_inputs(table)
    answer = tables.column(table, "task.answer", columns.answer, _ANSWERS)
    kind = tables.usual_column(table.columns, _KINDS)
    dialogues = []
    for row, where in zip(table.rows, table.where, strict=True):
        try:
            empty = next((name for name in (image, question, answer) if tables.is_missing(row[name])), None)
            if empty is not None:
                raise ValueError(f"column {empty} is empty")
            answers = most_frequent_first(answer, _listed(row[answer]))
            name = row[kind] if kind and not tables.is_missing(row[kind]) else kind_of(answers[0])
            place = place_in(images, str(row[image]).strip(), pictures)
        except ValueError as error:
            raise DataError(f"{where}: {first_line(error)}; mend the file") from error
        turns = ((f"{IMAGE}\n{str(row[question]).strip()}{suffix}", answers[0]),)
        dialogues.append(Dialogue(turns, (place,), answers, kind_name(name), where))
    return dialogues


def _listed(value: Any) -> Any:
    """Answers as texts: a cell may be a list, a list written as JSON, or one answer, which may be a number."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, list):
        return [str(answer) if isinstance(answer, int | float) else answer for answer in value]
    return str(value) if isinstance(value, int | float) else value
