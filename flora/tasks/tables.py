"""Tables of a user's own: CSV, TSV, JSON, JSON lines and parquet files, their columns, and the splits that they are."""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Features

from flora.errors import ConfigError, DataError, first_line
from flora.tasks import manifest
from flora.tasks.text.rows import read_table

FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
_NAMES = {"train": "train|training", "validation": "validation|validate|valid|val|dev", "test": "test"}
_DELIMITERS = ",;\t|"  # of CSV; the one that a header has most of, the first where it has none

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of one split.

    Attributes:
        columns: their names, in order.
        rows: each a mapping; what a row lacks is None, every cell of CSV and TSV is a text.
        where: of each row, for messages.
        names: of the classes of a column, where its file knows them.
        blank: lines between the rows that hold nothing and are none.
    """

    columns: list[str]
    rows: list[Row]
    where: list[str]
    names: dict[str, list[str]] = field(default_factory=dict)
    blank: list[int] = field(default_factory=list)


def split_of(name: str) -> str | None:
    """The split that a file or a part of a data set is, by its name: ``train``, ``train-00000-of-2``, ``dev``."""
    return next((split for split, words in _NAMES.items() if re.match(rf"({words})(?![a-z])", name.lower())), None)


def find(place: Path) -> dict[str, list[Path]]:
    """The files of each split of a folder; a single file, named or alone in its folder, is ``train``.

    Raises:
        DataError: none, or several and nothing says which is which.
    """
    if place.suffix.lower() in FORMATS and place.is_file():
        return {"train": [place]}
    if not place.is_dir():
        raise DataError(f"{place} is neither a folder nor one of {', '.join(FORMATS)}")
    files = [p for folder in (place, place / "data") if folder.is_dir() for p in folder.iterdir()]
    files = sorted(p for p in files if p.suffix.lower() in FORMATS and p.name != manifest.NAME and p.is_file())
    splits: dict[str, list[Path]] = {}
    for path in files:
        if split := split_of(path.stem):
            splits.setdefault(split, []).append(path)
    if not splits and len(files) == 1:
        return {"train": files}
    if "train" not in splits:
        there = ", ".join(p.name for p in files[:5]) or "none of these"
        raise DataError(
            f"{place} needs train, and may have validation and test, as {', '.join(FORMATS)}; it has {there}"
            + (f": task.dataset={files[0].name} in its place takes one file" if files else "")
        )
    for split, paths in splits.items():
        if len({p.suffix.lower() for p in paths}) > 1:
            raise DataError(f"{place} has {split} as {' and '.join(p.name for p in paths)}: remove all but one")
    return {split: splits[split] for split in _NAMES if split in splits}


def read(paths: Sequence[Path]) -> Table:
    """The rows of files that follow each other.

    Raises:
        DataError: a file that cannot be read, is not UTF-8, has rows of several widths, or none at all.
    """
    readers = {".parquet": _parquet, ".csv": _csv, ".tsv": _csv}
    whole = Table([], [], [])
    for path in paths:
        try:
            part = readers.get(path.suffix.lower(), _json)(path)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}{_line_of(path)} is not UTF-8: save it with that encoding") from error
        except (OSError, ValueError, RecursionError, csv.Error) as error:
            raise DataError(f"{path} cannot be read ({first_line(error)}): mend or fetch it again") from error
        whole.columns.extend(name for name in part.columns if name not in whole.columns)
        whole.rows.extend(part.rows)
        whole.where.extend(part.where)
        whole.blank.extend(part.blank)
        for name, names in part.names.items():
            if whole.names.setdefault(name, names) != names:
                raise DataError(f"{path}: class names of {name} differ from the other files': fetch them all again")
    if not whole.rows:
        raise DataError(f"{paths[0]}: no rows; fill it or fetch it again")
    return whole


def column(table: Table, key: str, asked: str | None, usual: Sequence[str]) -> str:
    """The column that a setting names, or else the first of the usual names, in any case of letters.

    Raises:
        ConfigError: no such column; the message lists those there are.
    """
    there = f"there are {', '.join(name or repr(name) for name in table.columns)}"
    if asked is not None:
        if asked in table.columns:
            return asked
        close = difflib.get_close_matches(asked, table.columns, 1)
        raise ConfigError(f"{key}={asked} is no column; {f'did you mean {close[0]}? ' if close else ''}{there}")
    if name := usual_column(table.columns, usual):
        return name
    raise ConfigError(
        f"{key}: none of the columns has a usual name: say which it is; {there} (a table's first row names them)"
    )


def usual_column(columns: Sequence[str], usual: Sequence[str]) -> str | None:
    """The first of the usual names that is a column, in any case of letters; None if none is."""
    by_name = {name.lower().strip(): name for name in reversed(columns)}
    return next((by_name[name] for name in usual if name in by_name), None)


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: None, NaN, or a text without letters or other signs."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip()


def drop_missing(table: Table, columns: Sequence[str], policy: str) -> int:
    """Leave out rows in place that lack a cell of these columns; how many.

    Args:
        table: changed.
        columns: their names.
        policy: ``skip``; with ``error`` none may lack one.

    Raises:
        DataError: one does, or all do.
    """
    lacking = {i: n for i, row in enumerate(table.rows) for n in columns if is_missing(row[n])}
    if lacking and policy == "error":
        row, name = next(iter(lacking.items()))
        more = f" ({len(lacking)} such rows)" if len(lacking) > 1 else ""
        raise DataError(f"{table.where[row]}: column {name} is empty{more}: fill it in or set task.missing=skip")
    if len(lacking) == len(table.rows):
        raise DataError(f"{table.where[0]}: no row has both a text and a label")
    table.rows[:] = [row for i, row in enumerate(table.rows) if i not in lacking]
    table.where[:] = [where for i, where in enumerate(table.where) if i not in lacking]
    return len(lacking)


def digest(table: Table) -> dict[str, Any]:
    """How many rows there are, and a checksum of their contents."""
    whole = hashlib.sha256(json.dumps(table.names, sort_keys=True).encode())
    for row in table.rows:
        whole.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return {"rows": len(table.rows), "sha256": whole.hexdigest()}


def texts_of(row: Row, columns: Sequence[str]) -> tuple[str, ...]:
    """The cells of these columns, as texts."""
    return tuple(value if isinstance(value := row[name], str) else str(value) for name in columns)


def repeated(texts: Mapping[str, Sequence[tuple[str, ...]]]) -> list[str]:
    """What to warn of: texts of a split that training sees as well."""
    seen = set(texts["train"])
    counts = {split: sum(text in seen for text in texts[split]) for split in texts if split != "train"}
    return [f"{n} of {len(texts[s])} texts of {s} are in train as well" for s, n in counts.items() if n]


def _csv(path: Path) -> Table:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        head = stream.readline()
        stream.seek(0)
        delimiter = "\t" if path.suffix.lower() == ".tsv" else max(_DELIMITERS, key=head.count)
        lines = csv.reader(stream, delimiter=delimiter, strict=True)
        header = next(lines, [])
        table = Table(_distinct(header), [], [])
        try:
            for cells in lines:
                if not cells:
                    table.blank.append(lines.line_num)
                    continue
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}, line {lines.line_num}: {len(cells)} cells, but the header has {len(header)}: put "
                        f"quotes around texts that contain {'a tab' if delimiter == chr(9) else delimiter}"
                    )
                table.rows.append(dict(zip(header, cells, strict=True)))
                table.where.append(f"{path}, line {lines.line_num}")
        except csv.Error as error:
            raise ValueError(
                f"line {lines.line_num}: {error}, as where a quote is not closed or not doubled"
            ) from error
    return table


def _json(path: Path) -> Table:
    text = path.read_text(encoding="utf-8-sig")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix.lower() == ".json" and not (len(lines) > 1 and lines[0][1].strip().endswith("}")):
        rows = json.loads(text)
        lists = [value for value in rows.values() if isinstance(value, list)] if isinstance(rows, dict) else []
        rows = lists[0] if len(lists) == 1 else rows
        where = [f"{path}, entry {number}" for number in range(len(rows))]
    else:
        rows, where = [], [f"{path}, line {number}" for number, _ in lines]
        for number, line in lines:
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number} is no JSON: {first_line(error)}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("a list of objects, or one object a line, was expected")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return Table(columns, [{name: row.get(name) for name in columns} for row in rows], where)


def _parquet(path: Path) -> Table:
    table = read_table(path)
    try:
        features = Features.from_arrow_schema(table.schema)
    except Exception as error:  # datasets raises almost any type on metadata that is not its own
        raise ValueError(f"its Hugging Face metadata: {first_line(error)}") from error
    names = {name: list(kind.names) for name, kind in features.items() if isinstance(kind, ClassLabel)}
    where = [f"{path}, row {number}" for number in range(table.num_rows)]
    return Table(list(table.column_names), table.to_pylist(), where, names)


def _distinct(header: list[str]) -> list[str]:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise ValueError(f"two columns are called {twice[0]!r}")
    return header


def _line_of(path: Path) -> str:
    """Which line of a file is not UTF-8, for a message."""
    with path.open("rb") as stream:
        if stream.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            return " (it is UTF-16)"
        stream.seek(0)
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f", line {number},"
    return ""
