"""A dataset's folder: filled, checked, and described by its manifest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from flora.errors import DataError
from flora.models.weights import sha256_of
from flora.tasks import manifest
from flora.tasks.prepare import leaks
from flora.tasks.prepare.items import Item


def state(item: Item, data: Path) -> str:
    """``ready``, ``without manifest`` or ``absent``."""
    folder = data / item.name
    if (folder / manifest.NAME).is_file():
        return "ready"
    return "without manifest" if folder.is_dir() and any(folder.iterdir()) else "absent"


def prepare(item: Item, data: Path, source: Path | None = None) -> dict[str, Any]:
    """Make, check and describe a dataset's folder; where it is ready, only check that nothing has changed.

    Args:
        item: the dataset.
        data: the data folder.
        source: a folder that holds the dataset's folder, to copy from; None: what can be downloaded.

    Returns:
        The manifest.

    Raises:
        DataError: no source can be reached, or the files are bad or have changed.
    """
    folder = data / item.name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        locks = data / ".locks"
        locks.mkdir(exist_ok=True)
        with FileLock(locks / f"{item.name.replace('/', '-')}.lock"):  # a second process waits, then finds it ready
            readiness = state(item, data)
            if readiness == "ready":
                content = manifest.read(folder)
                lost = [name for name in content["files"] if not (folder / name).is_file()]
                if lost:
                    raise DataError(f"{folder}: {lost[0]} is gone; remove the folder and prepare it again")
                manifest.check(folder, [folder / name for name in content["files"]])
                return content
            if readiness == "without manifest":
                return _describe(item, folder, "found there")
            fresh = folder.parent / f".{folder.name}.fresh"
            shutil.rmtree(fresh, ignore_errors=True)  # of a run that was interrupted
            fresh.mkdir()
            try:
                content = _describe(item, fresh, *_fill(item, fresh, source))
                os.replace(fresh, folder)
            except DataError as error:
                raise DataError(str(error).replace(str(fresh), f"{source or 'the download'}: {item.name}")) from error
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
            return content
    except OSError as error:
        raise DataError(f"{folder} cannot be prepared: {error}") from error


def _fill(item: Item, fresh: Path, source: Path | None) -> tuple[str, list[str]]:
    """Make the files of a folder; says where they come from, and what is wrong with their numbers."""
    if source is None:
        return item.fetch(fresh), []
    names = list(dict.fromkeys((item.name, *item.others)))
    place = next((source / name for name in names if (source / name).is_dir()), None)
    if place is None:
        raise DataError(f"{source} has no folder {' or '.join(names)}")
    warnings = item.convert(place, fresh) if item.convert else None
    if warnings is not None:
        return "made of the files as published", warnings
    shutil.copytree(place, fresh, dirs_exist_ok=True, ignore=shutil.ignore_patterns(manifest.NAME))
    return "copied", []


def _describe(item: Item, folder: Path, source: str, warnings: Sequence[str] = ()) -> dict[str, Any]:
    """Check what lies in a folder and write its manifest."""
    splits = item.read(folder)
    rows = {split: count for split, (count, _) in splits.items()}
    classes = max(number for _, number in splits.values())
    counts = [f"{s}: {rows.get(s, 0)} rows, officially {n}" for s, n in item.rows.items() if rows.get(s, 0) != n]
    warnings = [*warnings, *counts]
    if item.classes and classes != item.classes:
        warnings.append(f"{classes} classes occur, officially {item.classes}")
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".parquet", ".tsv", ".txt", ".json"))
    content = {
        "name": item.name,
        "source": source,
        "prepared": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": rows,
        "official_rows": item.rows,
        "classes": classes,
        "official_classes": item.classes,
        "warnings": warnings,
        "shared_images": leaks.count(item.pictures(folder)) if item.pictures else {},
        "files": {
            str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256_of(p)}
            for p in files
            if p.name != manifest.NAME
        },
    }
    if item.shared_texts is not None:
        content["shared_texts"] = item.shared_texts(folder)
    manifest.write(folder, content)
    return content
