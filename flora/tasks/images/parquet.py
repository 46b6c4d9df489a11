"""Image folders in the Hugging Face parquet layout: columns image{bytes, path} and label, class names in the schema."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features
from PIL import Image

from flora.errors import DataError, first_line
from flora.models.weights import sha256_of
from flora.tasks.images.decode import Pool, open_image

_BATCH = 64


def has_splits(folder: Path) -> bool:
    """Whether the folder holds what a task needs at least: ``train*.parquet`` and ``test.parquet``."""
    return any(folder.glob("train*.parquet")) and (folder / "test.parquet").is_file()


def open_pool(
    paths: list[Path], class_names: list[str], column: str = "label", first: int = 0
) -> tuple[Pool, dict[str, Any]]:
    """Check the files of one split and read their labels; images stay encoded until asked for.

    Args:
        paths: files that follow each other, at least one.
        class_names: as ``read_class_names`` found them; labels index them.
        column: that holds the labels.
        first: the label of class 0.

    Returns:
        The pool, and per file its rows and sha256.

    Raises:
        DataError: for a file that is no parquet, lacks a column, or has labels that do not fit.
    """
    files = [_open(path) for path in paths]
    labels, facts = [], {}
    for path, file in zip(paths, files, strict=True):
        _check_columns(path, file.schema_arrow, column)
        named = names_in(path, file.schema_arrow) if column == "label" else None
        if named is not None and named != class_names:
            raise DataError(f"{path}: class names or their order differ from the other files'; fetch them all again")
        labels.append(_labels(path, file, len(class_names), column, first))
        facts[path.name] = {"rows": len(labels[-1]), "sha256": sha256_of(path)}
    starts = np.cumsum([0, *map(len, labels)])
    if starts[-1] == 0:
        raise DataError(f"{paths[0]}: no rows; fetch the file again")

    def where(row: int) -> str:
        index = int(np.searchsorted(starts, row, side="right")) - 1
        return f"{paths[index]}, row {row - int(starts[index])}"

    def open_rows(rows: np.ndarray) -> Iterator[Callable[[], Image.Image]]:
        for path, file, start, stop in zip(paths, files, starts[:-1], starts[1:], strict=True):
            wanted = rows[(rows >= start) & (rows < stop)] - start
            yield from _open_images(path, file, wanted)

    return Pool(np.concatenate(labels), open_rows, where), facts


def read_class_names(paths: list[Path], num_classes: int | None) -> list[str]:
    """The names in the Hugging Face metadata of the first file that has them, or numbers.

    ``num_classes`` None takes as many as are named.

    Raises:
        DataError: if it names another number of classes, or a file is no parquet.
    """
    for path in paths:
        names = names_in(path, _open(path).schema_arrow)
        if names is not None:
            if num_classes is not None and len(names) != num_classes:
                raise DataError(
                    f"{path}: {len(names)} class names, but this dataset has {num_classes} classes; "
                    "check that the folder holds the right dataset"
                )
            return names
    if num_classes is None:
        raise DataError(f"{paths[0]} names no classes: say with task.classes how many there are")
    return [str(index) for index in range(num_classes)]


def shared_rows(paths: list[Path], others: list[Path]) -> np.ndarray:
    """Rows of the files ``paths``, counted through, whose encoded image is in one of ``others`` as well, int64."""
    seen = {cell["bytes"] for cell in _cells(others)} - {None}
    return np.array([row for row, cell in enumerate(_cells(paths)) if cell["bytes"] in seen], np.int64)


def _cells(paths: list[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        for batch in _open(path).iter_batches(batch_size=_BATCH, columns=["image"]):
            yield from batch.column(0).to_pylist()


def _open(path: Path) -> pq.ParquetFile:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError("it is no file")
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({first_line(error)}); fetch it again") from error


def _check_columns(path: Path, schema: pa.Schema, column: str) -> None:
    missing = [name for name in ("image", column) if schema.names.count(name) != 1]
    if missing:
        raise DataError(
            f"{path}: no single column {' and '.join(missing)} (it has {', '.join(schema.names)}); "
            f"an image dataset needs the columns image{{bytes, path}} and {column}"
        )
    image, label = schema.field("image").type, schema.field(column).type
    if not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
        raise DataError(f"{path}: column image is {image}; it must be a struct with the field bytes (encoded images)")
    if not pa.types.is_integer(label):
        raise DataError(f"{path}: column {column} is {label}; it must hold integers, the class indices")


def names_in(path: Path, schema: pa.Schema) -> list[str] | None:
    """The names of ``label`` in a file's Hugging Face metadata, None without them; DataError where it is broken."""
    try:
        feature = Features.from_arrow_schema(schema).get("label")
        names = list(feature.names) if isinstance(feature, ClassLabel) else None
        if names is not None and not all(isinstance(name, str) for name in names):
            raise ValueError("class names are no texts")
        return names
    except Exception as error:  # datasets raises almost any type on metadata that is not its own
        raise DataError(
            f"{path}: its Hugging Face metadata cannot be read ({first_line(error)}); write the file again, with "
            "another version of datasets or without metadata"
        ) from error


def _labels(path: Path, file: pq.ParquetFile, num_classes: int, name: str, first: int) -> np.ndarray:
    try:
        column = file.read(columns=[name])[name]
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: column {name} cannot be read ({first_line(error)}); fetch it again") from error
    try:  # missing labels become smaller than the first, out of range as well
        labels = column.cast(pa.int64()).fill_null(first - 1).to_numpy()
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: column {name} holds no class indices ({first_line(error)})") from error
    wrong = np.flatnonzero((labels < first) | (labels >= first + num_classes))
    if len(wrong):
        row = int(wrong[0])
        label = column[row].as_py()
        raise DataError(
            f"{path}, row {row}: {name} {'is missing' if label is None else label}, "
            f"outside {first}..{first + num_classes - 1} "
            f"({len(wrong)} such rows); mend the file or check that it is the right dataset"
        )
    return labels - first


def _open_images(path: Path, file: pq.ParquetFile, rows: np.ndarray) -> Iterator[Callable[[], Image.Image]]:
    start = taken = 0
    try:
        for batch in file.iter_batches(batch_size=_BATCH, columns=["image"]):
            stop = start + len(batch)
            end = int(np.searchsorted(rows, stop))
            for row in rows[taken:end]:
                cell = batch.column(0)[int(row) - start].as_py() or {}
                yield opener(path.parent, cell)
            start, taken = stop, end
            if taken == len(rows):
                return
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: column image cannot be read ({first_line(error)}); fetch it again") from error


def opener(folder: Path, cell: dict[str, Any]) -> Callable[[], Image.Image]:
    """A function that opens the image of a cell ``{bytes, path}``; paths start in ``folder``."""

    def open_cell() -> Image.Image:
        if cell.get("bytes") is not None:
            return open_image(cell["bytes"])
        if cell.get("path"):
            # The layout lets a file hold paths instead of bytes.
            place = Path(os.path.normpath(folder / cell["path"]))
            if not place.is_relative_to(os.path.normpath(folder)):
                raise ValueError(f"its path {cell['path']} leads out of the folder")
            return open_image(place)
        raise ValueError("neither bytes nor path")

    return open_cell
