"""Rows of text from parquet files, checked: columns, missing texts, labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from flora.errors import DataError, first_line
from flora.models.weights import sha256_of
from flora.tasks.images.parquet import names_in


@dataclass(frozen=True)
class Rows:
    """One split.

    Attributes:
        texts: the text columns of each row.
        labels: int64 class indices, or float32 targets, ``[N]``.
        facts: rows and sha256 of each file under ``files``.
    """

    texts: list[tuple[str, ...]]
    labels: np.ndarray
    facts: dict[str, Any]

    def __len__(self) -> int:
        return len(self.labels)

    def label_tensor(self) -> torch.Tensor:
        """The targets as a tensor."""
        return torch.from_numpy(self.labels)


def read_parquet(paths: Sequence[Path], columns: Sequence[str], classes: int, bounds: tuple[float, float]) -> Rows:
    """The rows of files that follow each other.

    Args:
        paths: at least one.
        columns: names of the text columns; the targets are in ``label``.
        classes: how many there are; 0 for numbers to predict.
        bounds: least and greatest number to predict.

    Raises:
        DataError: a file that is no parquet, lacks a column, misses a text, has targets that do not fit or no rows.
    """
    texts: list[tuple[str, ...]] = []
    labels: list[np.ndarray] = []
    facts: dict[str, Any] = {}
    for path in paths:
        table = read_table(path)
        missing = [name for name in (*columns, "label") if name not in table.column_names]
        if missing:
            raise DataError(
                f"{path}: no column {' and '.join(missing)} (it has {', '.join(table.column_names)}); "
                f"this dataset has {', '.join(columns)} and label"
            )
        names = names_in(path, table.schema)
        if names is not None and classes and len(names) != classes:
            raise DataError(f"{path}: {len(names)} class names, but this dataset has {classes} classes")
        where = partial(row_of, path)
        texts += check_texts([table[name].to_pylist() for name in columns], columns, where)
        labels.append(check_labels(table["label"].to_pylist(), classes, bounds, where))
        facts[path.name] = {"rows": table.num_rows, "sha256": sha256_of(path)}
    if not texts:
        raise DataError(f"{paths[0]}: no rows; fetch the file again")
    return Rows(texts, np.concatenate(labels), {"files": facts})


def read_table(path: Path) -> pa.Table:
    """A parquet file whose columns are whole and each of another name; DataError where it is none."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        table = pq.read_table(path)
        table.validate(full=True)  # also that texts are UTF-8
        if len(set(table.column_names)) < table.num_columns:
            raise ValueError(f"of its columns {', '.join(table.column_names)} some have one name")
        return table
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable parquet file ({first_line(error)}); fetch it again") from error


def check_labels(
    labels: Sequence[Any], classes: int, bounds: tuple[float, float], where: Callable[[int], str]
) -> np.ndarray:
    """Targets as an array: int64 in ``0..classes-1``, or float32 within ``bounds`` where ``classes`` is 0.

    Raises:
        DataError: one is missing, not a number, or out of range; the message names the first row.
    """
    low, high = (0.0, classes - 1.0) if classes else bounds
    try:
        values = np.array([np.nan if label is None else float(label) for label in labels])
    except (TypeError, ValueError) as error:
        raise DataError(f"{where(0)}: labels are no numbers ({first_line(error)})") from error
    fits = (values >= low) & (values <= high) & ((values == np.round(values)) | (classes == 0))
    wrong = np.flatnonzero(~fits)
    if len(wrong):
        hidden = "; -1 marks the hidden labels of a test split" if values[wrong[0]] == -1 else ""
        raise DataError(
            f"{where(int(wrong[0]))}: label {labels[int(wrong[0])]}, outside {low:g}..{high:g} "
            f"({len(wrong)} such rows){hidden}; mend the file or check that it is the right dataset"
        )
    return values.astype(np.int64 if classes else np.float32)


def check_texts(
    columns: Sequence[Sequence[Any]], names: Sequence[str], where: Callable[[int], str]
) -> list[tuple[str, ...]]:
    """Text columns as rows; DataError for a cell that is no text."""
    for name, values in zip(names, columns, strict=True):
        for row, value in enumerate(values):
            if not isinstance(value, str):
                raise DataError(f"{where(row)}: column {name} holds {value!r} instead of a text; mend the file")
    return list(zip(*columns, strict=True))


def row_of(path: Path, row: int) -> str:
    """Names a row for an error message."""
    return f"{path}, row {row}"
