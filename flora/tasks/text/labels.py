"""What a column of labels means: classes with names, or numbers to predict."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flora.errors import DataError
from flora.tasks.portions import by_value

KINDS = ("auto", "classification", "regression")
_HIDDEN = "; a label of -1 marks the hidden ones of a published test split"
_SHOWN = 4
# 1,5 and 1.500,0 and 1,500.00 and 1 500: numbers that Python does not read
_SEPARATED = re.compile(r"[+-]?(\d+,\d+|\d{1,3}([.,' \u00a0\u202f]\d{3})+([.,]\d+)?)")
_CODE = re.compile(r"\s*[+-]?0\d")


def kind_of(cells: Sequence[Any], named: bool, kind: str) -> tuple[str, str]:
    """``classification`` or ``regression``, and why: as asked, or by the cells of a column.

    Numbers that are not all whole are a regression, all else are classes.
    """
    if kind != "auto":
        return kind, f"task.kind={kind}"
    if named:
        return "classification", "its classes have names"
    numbers = _numbers(cells)
    if any(number is None for number in numbers):
        return "classification", "its labels are words"
    if _whole(numbers):
        return "classification", "its labels are whole numbers"
    return "regression", "its labels are numbers with fractions"


def are_whole(cells: Sequence[Any]) -> bool:
    """Whether all labels are whole numbers, however they are written."""
    return _whole(_numbers(cells))


def amounts(cells: Sequence[Any], classes: Sequence[str]) -> list[str]:
    """Warnings of labels that are classes and may be amounts: many whole numbers, or numbers with separators.

    Many are over twenty, with under ten rows of each on average.
    """
    read = [_number(cell) is None and isinstance(cell, str) and _SEPARATED.fullmatch(cell.strip()) for cell in cells]
    if any(read) and all(one or _number(cell) is not None for one, cell in zip(read, cells, strict=True)):
        example = next(cell.strip() for one, cell in zip(read, cells, strict=True) if one)
        return [f"its labels look like numbers with separators ({example}): write them as 1234.5, or they stay classes"]
    if not are_whole(cells) or len(classes) <= max(20, len(cells) // 10):
        return []
    return [
        f"each of {len(classes)} whole numbers is a class of its own; where they are amounts to predict, set "
        "task.kind=regression"
    ]


def alike(classes: Sequence[str]) -> list[str]:
    """Warnings of classes whose names differ in the case of letters and spaces alone, as ``yes`` and ``Yes``."""
    same: dict[str, list[str]] = {}
    for name in classes:
        same.setdefault(" ".join(name.split()).casefold(), []).append(name)
    return [
        f"{' and '.join(map(repr, names))} are classes of their own: write them alike where they mean the same"
        for names in same.values()
        if len(names) > 1
    ]


def as_classes(cells: Sequence[Any], names: Sequence[str] | None, whole: bool) -> list[str]:
    """The name of each cell's class.

    Args:
        cells: labels of a split.
        names: of the classes by index, where the file knows them.
        whole: the labels of all splits are whole numbers, so that 1 and 1.0 are one class.
    """
    if names is None and whole:
        return [str(int(float(cell))) for cell in cells]
    return [
        names[cell] if names is not None and isinstance(cell, int) and 0 <= cell < len(names) else str(cell).strip()
        for cell in cells
    ]


def as_numbers(cells: Sequence[Any], where: Sequence[str]) -> np.ndarray:
    """Numbers float32 ``[N]``; DataError with the row for one that is none, or not finite."""
    numbers = [_number(cell) for cell in cells]
    for row, number in enumerate(numbers):
        if number is None or not math.isfinite(np.float32(number)):
            separated = isinstance(cells[row], str) and _SEPARATED.fullmatch(cells[row].strip())
            mend = "write it as 1234.5" if separated else "mend the file, or set task.kind=classification"
            raise DataError(
                f"{where[row]}: label {cells[row]!r} is no finite number, as task.kind=regression needs: {mend}"
            )
    return np.array(numbers, np.float32)


def indices(
    named: Mapping[str, Sequence[str]], names: Sequence[str] | None, trained: Sequence[str] | None = None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Class indices of every split, and the classes: in the file's order, else by value or alphabet.

    Args:
        named: the class of each row.
        names: of the classes, where the file knows them.
        trained: classes of a run that is tested, which stand where they hold all of these.

    Raises:
        DataError: a split has a class that train lacks, or train a label that is none of the names.
    """
    train = set(named["train"])
    if trained and all(set(own) <= set(trained) for own in named.values()):
        place = {name: index for index, name in enumerate(trained)}
        return {split: np.array([place[name] for name in own], np.int64) for split, own in named.items()}, [*trained]
    if names and (unnamed := sorted(train - set(names))):
        raise DataError(f"train has the label {unnamed[0]}, which is none of its classes {', '.join(names)}: mend it")
    classes = [name for name in names if name in train] if names else by_value([*train])
    place = {name: index for index, name in enumerate(classes)}
    for split, own in named.items():
        if new := by_value([*(set(own) - train)]):
            shown = ", ".join(new[:_SHOWN]) + (", ..." if len(new) > _SHOWN else "")
            raise DataError(
                f"{split} has {len(new)} of its classes only there, not in train ({shown}): add examples to train, or "
                f"leave them out; labels that are numbers to predict need task.kind=regression"
                + (_HIDDEN if "-1" in new else "")
            )
    return {split: np.array([place[name] for name in own], np.int64) for split, own in named.items()}, classes


def _numbers(cells: Sequence[Any]) -> list[float | None]:
    """Cells as numbers; None for what is none, and for codes: 01 is another one than 1."""
    return [None if isinstance(cell, str) and _CODE.match(cell) else _number(cell) for cell in cells]


def _number(cell: Any) -> float | None:
    if isinstance(cell, bool) or not isinstance(cell, int | float | str):
        return None
    try:
        return float(cell)
    except (ValueError, OverflowError):
        return None


def _whole(numbers: Sequence[float | None]) -> bool:
    return all(number is not None and number.is_integer() for number in numbers)
