"""What ``input=`` of mode=predict names, as inputs of a predictor, with the columns that tell them apart."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flora.contents import IMAGES as SUFFIXES
from flora.contents import everything
from flora.errors import ConfigError, DataError, first_line
from flora.tasks import tables
from flora.tasks.imagefolder.files import say_ignored
from flora.tasks.images.decode import Picture, open_image
from flora.tasks.images.parquet import opener
from flora.tasks.text.rows import row_of
from flora.tasks.vqa.rows import Columns

TABLES = tables.FORMATS
PICTURES = ("image", "segmentation", "detection")  # kinds of model whose inputs are pictures
_FILES = (*TABLES, ".txt", *SUFFIXES)


@dataclass(frozen=True)
class Inputs:
    """Inputs and what the file of predictions says of them.

    Attributes:
        values: as ``flora.predict.Predictor.predict`` takes them.
        columns: by name a cell for each: ``path`` or ``row``, perhaps more.
    """

    values: Sequence[Any]
    columns: dict[str, list[Any]]


def read(given: Any, kind: str, texts: Sequence[str], columns: Columns | None = None) -> Inputs:
    """The inputs of a run.

    Args:
        given: ``input=``: a folder, a file or a text; or a list: [IMAGE, QUESTION], or the texts of one example.
        kind: of the run's model, see ``flora.models.spec``.
        texts: names of the run's text columns.
        columns: which of its columns were image and question; None: by usual names.

    Raises:
        ConfigError: what is given is of another kind than the run's inputs.
        DataError: a file that is missing or unreadable.
    """
    if isinstance(given, list):
        if len(given) < 2 or kind in PICTURES or not all(isinstance(value, str) for value in given):
            raise ConfigError(f"input={given}: this run takes one folder, file or text")
        if kind == "image_text":
            return Inputs([tuple(given)], {"path": given[:1], "question": given[1:2]})
        return Inputs([tuple(given)], {"row": [0]})
    if not isinstance(given, str | int | float) or not str(given).strip():
        raise ConfigError("mode=predict needs input=, a folder, a file or a text")
    given = str(given)
    place = Path(given).expanduser()
    there = os.path.exists(place)  # unlike Path.exists no error where a text is no name
    if not there and (kind in (*PICTURES, "image_text") or _is_path(given)):
        raise DataError(f"input={given}: there is no such file or folder")
    if kind in PICTURES:
        return _pictures(place)
    if kind == "image_text":
        return _questions(place, columns or Columns())
    return _texts(place if there else None, given, texts)


def _is_path(given: str) -> bool:
    return given.lower().endswith(_FILES) or (os.sep in given and not any(c.isspace() for c in given))


def _pictures(place: Path) -> Inputs:
    if place.is_dir():
        found = [path for path in everything(place) if path.suffix.lower() in SUFFIXES]
        if not found:
            raise DataError(f"input={place}: no pictures in there ({', '.join(SUFFIXES)})")
        say_ignored(place)
        return Inputs(found, {"path": _shown(found)})
    if place.suffix.lower() == ".parquet":
        table = read_rows(place)
        if "image" not in table.columns:
            raise DataError(f"{place}: no column image (it has {', '.join(table.columns)})")
        pictures = _cells(place, [row["image"] for row in table.rows], "image")
        return Inputs(pictures, {"row": list(range(len(pictures)))})
    if place.suffix.lower() in (*TABLES, ".txt"):
        raise ConfigError(f"input={place}: this run takes a picture, a folder of pictures or a parquet file of them")
    return Inputs([place], {"path": _shown([place])})


def _shown(paths: Sequence[Path]) -> list[str]:
    """Paths as texts, also where their bytes are no UTF-8."""
    return [os.fsencode(path).decode(errors="replace") for path in paths]


def _cells(place: Path, cells: Sequence[Any], column: str) -> list[Picture]:
    """The images of a parquet file's column: structs ``{bytes, path}``, encoded bytes or paths."""
    pictures = []
    for number, cell in enumerate(cells):
        if isinstance(cell, str):
            cell = {"path": cell}
        elif isinstance(cell, bytes):
            cell = {"bytes": cell}
        if not isinstance(cell, dict):
            raise DataError(f"{row_of(place, number)}: column {column} holds {cell!r:.60} instead of an image")
        pictures.append(Picture(opener(place.parent, cell), row_of(place, number)))
    return pictures


def _texts(place: Path | None, given: str, names: Sequence[str]) -> Inputs:
    if place is None or (place.is_file() and place.suffix.lower() == ".txt"):
        if len(names) > 1:
            raise ConfigError(f"input={given}: this run takes a table ({', '.join(TABLES)}) with {' and '.join(names)}")
        lines = [given] if place is None else [line.strip() for line in _lines(place)]
        rows = [number for number, line in enumerate(lines) if line]
        if not rows:
            raise DataError(f"{place}: no lines")
        _tell_blank(place, len(lines) - len(rows), "row counts them, so that it is the line of the file, from 0")
        return Inputs([lines[number] for number in rows], {"row": rows})
    table = read_rows(place)
    if len(names) == 1 and names[0] not in table.columns and len(table.columns) == 1:
        print(
            f"{place}: the column {table.columns[0]!r}, as its first line names it, is taken for {names[0]}",
            file=sys.stderr,
        )
        names = table.columns
    values = list(zip(*(_column(place, table, name) for name in names), strict=True))
    return Inputs(values, {"row": list(range(len(values)))})


def _questions(place: Path, columns: Columns) -> Inputs:
    if not place.is_file() or place.suffix.lower() not in TABLES:
        raise ConfigError(
            f"input={place}: this run takes a table ({', '.join(TABLES)}) with image and question, or [IMAGE,QUESTION]"
        )
    table = read_rows(place)
    image, question = columns.of_inputs(table)
    asked = _column(place, table, question)
    numbers: dict[str, list[Any]] = {"row": list(range(len(asked)))}
    if all(isinstance(row[image], str) for row in table.rows):
        paths = [_beside(place.parent, file) for file in _column(place, table, image)]
        pictures = [Picture(partial(open_image, path), str(path)) for path in paths]
        numbers["path"] = _shown(paths)
    else:
        pictures = _cells(place, [row[image] for row in table.rows], image)
    return Inputs(list(zip(pictures, asked, strict=True)), numbers | {"question": asked})


def _beside(folder: Path, file: str) -> Path:
    """An image beside a table or in the folder ``images`` there."""
    place = folder / file
    return place if place.exists() or not (folder / "images" / file).exists() else folder / "images" / file


def _column(place: Path, table: tables.Table, name: str) -> list[str]:
    if name not in table.columns:
        raise DataError(f"{place}: no column {name} (it has {', '.join(table.columns)})")
    cells = [row[name] for row in table.rows]
    for where, value in zip(table.where, cells, strict=True):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: column {name} holds {value!r:.60} instead of a text")
    return cells


def read_rows(place: Path) -> tables.Table:
    """The rows of a table.

    Raises:
        ConfigError: a file of another kind.
        DataError: one that cannot be read, or has no rows.
    """
    if place.suffix.lower() not in TABLES:
        raise ConfigError(f"input={place}: a table must be {', '.join(TABLES)}")
    if not place.is_file():  # a pipe would be waited for
        raise DataError(f"{place} is no file")
    table = tables.read([place])
    _tell_blank(place, len(table.blank), "row does not count them, as most readers of tables do not")
    return table


def _tell_blank(place: Path | None, count: int, how: str) -> None:
    if count:
        lines = "1 blank line is" if count == 1 else f"{count} blank lines are"
        print(f"{place}: {lines} left out; {how}", file=sys.stderr)


def _lines(place: Path) -> list[str]:
    try:
        if not place.is_file():  # a pipe would be waited for
            raise OSError("it is no file")
        # Not str.splitlines, which also splits at characters that texts may hold.
        with place.open(encoding="utf-8-sig", newline="") as stream:
            return list(stream)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{place} cannot be read ({first_line(error)}): a text file in UTF-8 is needed") from error
