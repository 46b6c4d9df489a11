"""Data that comes without splits: drawn into train, validation and test, the same on every machine."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from flora.errors import ConfigError
from flora.files import whole_file
from flora.launch import processes
from flora.tasks.base import draw

SPLITS = ("train", "validation", "test")
AS_FILES = "as in the files"
WHOLE = "all of it is the test"  # of data that has no splits, on which a run of other data is tested
ALONE = "a test alone"  # of benchmarks
UNDRAWN = (AS_FILES, WHOLE, ALONE)
_USUAL = (70.0, 15.0, 15.0)


def shares(split: Sequence[float] | None) -> tuple[float, float, float]:
    """The parts of train, validation and test, which add up to 1, of ``task.split``; None: 70, 15 and 15 %.

    Raises:
        ConfigError: not three numbers above zero.
    """
    given = _USUAL if split is None else split
    numbers = isinstance(given, list | tuple) and all(
        isinstance(part, int | float) and not isinstance(part, bool) and 0 < part < 1e9 for part in given
    )
    if not numbers or len(given) != len(SPLITS):
        raise ConfigError(f"task.split={split} must be three numbers above zero: train, validation, test")
    train, validation, test = (part / sum(given) for part in given)
    return train, validation, test


def portions(strata: np.ndarray, parts: tuple[float, float, float], seed: int) -> dict[str, np.ndarray]:
    """Rows of each split, ascending: every stratum is divided in the same proportion.

    A stratum of three rows and more is in every split; of two, train has one and the test one; of one, train has it.

    Args:
        strata: int64 ``[N]``, such as class indices; all equal where there is nothing to balance.
        parts: as ``shares`` gives them.
        seed: of the draw.
    """
    order = draw(len(strata), seed)
    chosen: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for stratum in np.unique(strata):
        rows = order[strata[order] == stratum]
        count = len(rows)
        test = min(max(1, round(parts[2] * count)), count - 1)
        validation = min(max(1, round(parts[1] * count)), count - 1 - test)
        for split, part in zip(SPLITS, np.split(rows, [count - test - validation, count - test]), strict=True):
            chosen[split].append(part)
    return {split: np.sort(np.concatenate(rows)) for split, rows in chosen.items()}


def hold_out(strata: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that stay and rows that are held out, ascending; every stratum keeps at least one row, and all may stay."""
    order = draw(len(strata), seed)
    parts = []
    for stratum in np.unique(strata):
        rows = order[strata[order] == stratum]
        parts.append(rows[: min(round(share * len(rows)), len(rows) - 1)])
    held = np.sort(np.concatenate(parts))
    return np.setdiff1d(np.arange(len(strata)), held), held


def rule_of(parts: tuple[float, float, float], seed: int, balanced: str | None) -> str:
    """How records and messages say what ``portions`` did; ``balanced``: what the strata are."""
    percent = "/".join(f"{100 * part:.3g}" for part in parts)
    return f"drawn {percent} % train/validation/test{f' of each {balanced}' if balanced else ''}, seed {seed}"


def absent(labels: Mapping[str, np.ndarray], names: Sequence[str]) -> list[str]:
    """What to warn of: the classes that a split beside train lacks, over which its metrics are then not taken."""
    warnings = []
    for split in (split for split in SPLITS[1:] if split in labels):
        counted = Counter(labels[split].tolist())
        missing = [name for index, name in enumerate(names) if not counted[index]]
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            warnings.append(f"{split} has no example of {len(missing)} of {len(names)} classes ({shown})")
    return warnings


def write_drawn(drawn: Mapping[str, Sequence[str]], path: Path) -> None:
    """A CSV file of which example is in which split, ``split,example``."""
    with whole_file(path) as place, place.open("w", newline="", encoding="utf-8", errors="replace") as stream:
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerow(("split", "example"))
        rows.writerows((split, name) for split, names in drawn.items() for name in names)


def by_value(names: Sequence[str]) -> list[str]:
    """Names of classes in order: by value where all are whole numbers (1, 2, 10), else as texts."""
    try:
        return sorted(names, key=lambda name: (int(name), name))
    except ValueError:
        return sorted(names)


def say(text: str) -> None:
    """A line on stderr, of the first process alone."""
    if processes.first():
        print(text, file=sys.stderr, flush=True)
