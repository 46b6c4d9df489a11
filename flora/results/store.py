"""Where records live: one JSON file per run id, found again by that id."""

import json
from pathlib import Path
from typing import Any

from flora.results.record import SCHEMA_VERSION, STATUSES, Record

_REQUIRED = ("schema_version", "run_id", "status", "task", "dataset", "model", "adapter", "seed")


class Store:
    """Records under a folder.

    Args:
        folder: holds ``RUN_ID.json`` files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, run_id: str) -> Path:
        """Where the record of a run id is, or would be."""
        return self.folder / f"{run_id}.json"

    def finished(self, run_id: str) -> dict[str, Any] | None:
        """The finished record of a run id, or None."""
        path = self.path(run_id)
        if not path.exists():
            return None
        record, problem = read(path)
        return record if problem is None and record and record["status"] == "finished" else None

    def write(self, record: Record) -> Path:
        """Write a record atomically; returns its path."""
        path = self.path(record.run_id)
        record.write(path)
        return path

    def read_all(self) -> tuple[list[dict[str, Any]], list[str]]:
        """All sound records, in file-name order, and one line for each file that is not a sound record."""
        records, problems = [], []
        for path in sorted(self.folder.glob("*.json")):
            record, problem = read(path)
            if problem is not None:
                problems.append(problem)
            elif record is not None:
                records.append(record)
        return records, problems


def read(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """A record and None, or None and what is wrong with the file in one line."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        return None, f"{path}: not readable as JSON ({error})"
    if not isinstance(record, dict) or any(key not in record for key in _REQUIRED):
        return None, f"{path}: not a record (needs {', '.join(_REQUIRED)})"
    if record["schema_version"] != SCHEMA_VERSION:
        return None, f"{path}: schema version {record['schema_version']}, this code reads {SCHEMA_VERSION}"
    if record["status"] not in STATUSES:
        return None, f"{path}: unknown status {record['status']!r}"
    value = record.get("value")
    if record["status"] == "finished" and not (isinstance(value, int | float) and abs(value) < float("inf")):
        return None, f"{path}: finished without a finite value"
    return record, None
