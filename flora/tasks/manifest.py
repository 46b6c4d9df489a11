"""manifest.json of a dataset folder: what its files were when they were prepared; other files are refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flora.errors import DataError
from flora.files import write_json
from flora.models.weights import sha256_of

NAME = "manifest.json"


def read(folder: Path) -> dict[str, Any]:
    """What the folder's manifest says; without one, that there are no ``files``."""
    path = folder / NAME
    try:
        content = json.loads(path.read_text()) if path.is_file() else {"files": {}}
        files = content.get("files") if isinstance(content, dict) else None
        if not isinstance(files, dict) or not all(isinstance(facts, dict) for facts in files.values()):
            raise ValueError("it lists no files")
        return content
    except ValueError as error:
        raise DataError(f"{path} is no manifest ({error}): delete it or prepare the dataset again") from error


def check(folder: Path, paths: Sequence[Path]) -> None:
    """Raise DataError where a file differs from what the folder's manifest says of it."""
    files = read(folder)["files"]
    for path in paths:
        expected = files.get(str(path.relative_to(folder)), {}).get("sha256")
        if expected and path.is_file() and (digest := sha256_of(path)) != expected:
            raise DataError(
                f"{path} has changed since it was prepared (sha256 {digest}, {NAME} says {expected}): "
                f"remove the folder and prepare it again, or delete {NAME} if the change is meant"
            )


def write(folder: Path, content: dict[str, Any]) -> None:
    """Write the manifest atomically."""
    write_json(folder / NAME, content)
