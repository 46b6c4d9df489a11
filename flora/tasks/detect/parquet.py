"""Annotated images in the Hugging Face parquet layout: image{bytes, path}, width, height, objects{bbox, category}."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features

from flora.errors import DataError, first_line
from flora.models.weights import sha256_of
from flora.tasks.detect.objects import Objects, Part, checked, joined
from flora.tasks.images.parquet import opener

COLUMNS = ("image", "width", "height", "objects")


def read(paths: Sequence[Path]) -> tuple[Part, list[str], dict[str, Any]]:
    """The images of one split, which stay encoded; the names of the classes, and rows and checksum of each file.

    Boxes are left, top, width and height in pixels; ``category`` is an index of the names in the file's metadata.

    Raises:
        DataError: a file that cannot be read, lacks a column or names no classes, or annotations that do not fit.
    """
    parts, facts, names = [], {}, None
    for path in paths:
        table = _table(path)
        found = _class_names(path, table.schema)
        if names is not None and found != names:
            raise DataError(f"{path}: class names or their order differ from the other files'; fetch them all again")
        names = found
        parts.append(checked(_part(path, table, len(names)), str(path)))
        facts[path.name] = {"rows": len(parts[-1]), "sha256": sha256_of(path)}
    assert names is not None
    return joined(parts), names, facts


def _table(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({first_line(error)}); fetch it again") from error
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise DataError(
            f"{path}: no column {' and '.join(missing)} (it has {', '.join(table.column_names)}); detection needs "
            "image{bytes, path}, width, height and objects{bbox, category}"
        )
    return table


def _class_names(path: Path, schema: pa.Schema) -> list[str]:
    try:
        category = Features.from_arrow_schema(schema)["objects"]["category"]
        names = getattr(category.feature, "names", None)
    except Exception as error:  # datasets raises almost any type on metadata that is not its own
        raise DataError(f"{path}: its Hugging Face metadata cannot be read ({first_line(error)})") from error
    if not names:
        raise DataError(f"{path} names no classes: write objects.category as a ClassLabel of datasets")
    return list(names)


def _part(path: Path, table: pa.Table, classes: int) -> Part:
    try:
        objects = [row or {"bbox": [], "category": []} for row in table["objects"].to_pylist()]
        counts = [len(row["category"]) for row in objects]
        boxes = np.array([box for row in objects for box in row["bbox"]], np.float64).reshape(-1, 4)
        labels = np.array([label for row in objects for label in row["category"]], np.int64)
        sizes = np.stack([table["height"].to_numpy(), table["width"].to_numpy()], axis=1).astype(np.int64)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: column objects has no boxes of four numbers with a class ({first_line(error)})"
        ) from error
    if [len(row["bbox"]) for row in objects] != counts:
        raise DataError(f"{path}: there are not as many boxes as classes in column objects; write it again")
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        row = int(np.searchsorted(np.cumsum(counts), wrong[0], side="right"))
        raise DataError(
            f"{path}, row {row}: class id {labels[wrong[0]]} is unknown, the file names {classes} classes "
            f"({len(wrong)} such boxes)"
        )
    cells = table["image"].to_pylist()
    return Part(
        [opener(path.parent, cell or {}) for cell in cells],
        [f"{path}, row {row}" for row in range(len(cells))],
        sizes,
        Objects(
            boxes,
            labels,
            np.zeros(len(boxes), bool),
            boxes[:, 2] * boxes[:, 3],
            None,
            np.cumsum([0, *counts]),
        ),
    )
