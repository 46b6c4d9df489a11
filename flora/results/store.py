"""Where records live: one JSON file per run id, found again by that id, with a lock while the run is on.

Tables find records by the id of their cell, which does not depend on the data (``flora.config.cell_id``).
"""

import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flora.config import recorded_cell
from flora.errors import AlreadyRunning, CheckpointError, DataError, FailedBefore
from flora.files import ROOT
from flora.launch import processes
from flora.results.checks import fault
from flora.results.lock import HEARTBEAT, STALE_AFTER, Claim, Lock, Owner, owners, shown
from flora.results.record import SCHEMA_VERSION, Record, now

SHIPPED = ROOT / "results" / "measured"  # the records that ship with flora
_HEAVY = ("history", "analysis", "ranks", "config", "data")  # left out of summaries: most of a record's bytes
_CACHE_VERSION = b"6"  # bumped when summaries or the checks of `read` change


@dataclass(frozen=True)
class Contents:
    """What a folder holds, or several.

    Attributes:
        records: sound records by run id, without their longest fields; with ``path`` and ``sha256`` of their file, and
            ``cell_id`` and ``inputs`` of their config.
        problems: one line for each file that is not a sound record, or a sound lock; more are added where a table asks.
        owners: who runs, or ran and died, by run id.
    """

    records: dict[str, dict[str, Any]]
    problems: list[str]
    owners: dict[str, Owner]

    def state(self, cell_id: str, older: Iterable[str] = ()) -> str:
        """``running``, ``ambiguous``, ``finished``, ``failed``, ``interrupted``, ``stale`` or ``missing``.

        Args:
            cell_id: the cell.
            older: its ids under earlier method versions; a finished record of one of them is stale.
        """
        records = self.of_cell.get(cell_id, [])
        runs = {cell_id, *(record["run_id"] for record in records)}
        owners = [o for run_id, o in self.owners.items() if run_id in runs or o.facts.get("cell") == cell_id]
        if any(owner.alive for owner in owners):
            return "running"
        if finished := [record for record in records if record["status"] == "finished"]:
            return "finished" if len(finished) == 1 else "ambiguous"
        if ended := [record["status"] for record in records if record["status"] != "running"]:
            return ended[-1]
        if owners or records:
            return "interrupted"  # its process ended without a word
        return "stale" if any(self.finished(old) for old in older) else "missing"

    def finished(self, cell_id: str) -> dict[str, Any] | None:
        """The summary of a cell's finished record, or None; also where there are several, which is a problem."""
        records = [record for record in self.of_cell.get(cell_id, []) if record["status"] == "finished"]
        if len(records) > 1:
            runs = " and ".join(sorted(record["run_id"] for record in records))
            which = f"{records[0]['dataset']} {records[0]['model']} {records[0]['adapter']}"
            problem = f"runs {runs} ({which}) are of one cell, on other data or weights: keep one record here"
            if problem not in self.problems:
                self.problems.append(problem)
        return records[0] if len(records) == 1 else None

    def whole(self, run_id: str) -> dict[str, Any] | None:
        """The whole record of a run, or None."""
        record = self.records.get(run_id)
        return None if record is None else read(Path(record["path"]))[0]

    def with_own(self, own: "Contents") -> "Contents":
        """These, and what another folder has of cells that are not finished here."""
        further = {run: r for run, r in own.records.items() if r["cell_id"] not in self._finished_cells}
        problems = [*self.problems, *own.problems]
        return Contents(further | self.records, problems, own.owners | self.owners)

    @cached_property
    def of_cell(self) -> dict[str, list[dict[str, Any]]]:
        """Records by cell id."""
        cells: dict[str, list[dict[str, Any]]] = {}
        for record in self.records.values():
            cells.setdefault(record["cell_id"], []).append(record)
        return cells

    @cached_property
    def _finished_cells(self) -> set[str]:
        return {record["cell_id"] for record in self.records.values() if record["status"] == "finished"}

    @cached_property
    def datasets(self) -> set[str]:
        """The data sets that records are about."""
        return {record["dataset"] for record in self.records.values()}


class Store:
    """Records under a folder.

    Args:
        folder: holds ``RUN_ID.json`` files; records of other machines are copied in.
        heartbeat, stale_after: of the locks, in seconds (``flora.results.lock``).
    """

    def __init__(self, folder: str | Path, heartbeat: float = HEARTBEAT, stale_after: float = STALE_AFTER) -> None:
        self.folder = Path(folder)
        self.heartbeat = heartbeat
        self.stale_after = stale_after
        self._told: set[str] = set()

    def path(self, run_id: str) -> Path:
        """Where the record of a run id is, or would be."""
        return self.folder / f"{run_id}.json"

    def finished(self, run_id: str) -> dict[str, Any] | None:
        """The finished record of a run id, whole, or None."""
        record, _ = self._look(run_id)
        return record if record is not None and record["status"] == "finished" else None

    def settled(self, run_id: str, retry: bool = False, force: bool = False) -> dict[str, Any] | None:
        """The finished record that makes a run unnecessary, or None where the run has to be done.

        Args:
            run_id: the run.
            retry: do a run again that failed.
            force: do any run again.

        Raises:
            FailedBefore: the run failed, and neither ``retry`` nor ``force`` asks for another attempt.
            DataError: a newer version of flora wrote the record.
        """
        record, problem = self._look(run_id)
        self._check_age(run_id)
        if problem is not None and problem not in self._told:
            self._told.add(problem)
            print(f"warning: {problem}: it is left out, the run is done anew", file=sys.stderr)
        record = None if force else record
        if record is not None and record["status"] == "failed" and not retry:
            raise FailedBefore(f"run {run_id} failed before ({record.get('error')}): retry=true tries again")
        return record if record is not None and record["status"] == "finished" else None

    def lock(self, run_id: str, cell_id: str | None = None, about: Mapping[str, Any] | None = None) -> Lock:
        """The lock to hold while a run is on; entering it raises AlreadyRunning when another process does."""
        return Lock(self.folder, run_id, self.heartbeat, self.stale_after, cell_id, about)

    def write(self, record: Record, claim: Claim | None = None) -> Path:
        """Write a record atomically; returns its path. A finished record gives way to another finished one only.

        Raises:
            AlreadyRunning: the claim to the run is lost.
            CheckpointError: the disk is full or refuses.
            DataError: what is there was written by a newer version of flora.
        """
        path = self.path(record.run_id)
        if claim is not None:
            claim.check()
        self._check_age(record.run_id)
        if record.status == "finished" or self.finished(record.run_id) is None:
            try:
                record.write(path)
            except OSError as error:
                reason = error.strerror or error
                raise CheckpointError(
                    f"record {path} cannot be written ({reason}): make room and start the run again to go on"
                ) from error
        return path

    def end(self, record: Record, status: str, error: BaseException, claim: Claim) -> Path | None:
        """Write the record of a run that has ended early; None where another process does, or none can be written."""
        if not processes.tells():
            return None
        try:
            return self.write(
                replace(record, status=status, error=repr(error), finished=max(now(), record.started)), claim
            )
        except (AlreadyRunning, CheckpointError) as also:
            print(f"warning: {also}", file=sys.stderr)  # the error that ended the run is still to be told
            return None

    def read_all(self) -> Contents:
        """Everything in the folder; files that have not changed since the last look come from a parquet cache.

        Raises:
            DataError: the folder is a file.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise DataError(f"{self.folder} is not a folder of records")
        cache, cached = self.folder / ".cache" / "records.parquet", dict[tuple[str, int, int], tuple[Any, Any]]()
        if self.folder.is_dir():
            cached = _read_cache(cache)
        files, problems = _files(self.folder)
        looked = {key: cached.get(key) or _summary(self.folder / key[0]) for key in files}
        if looked.keys() != cached.keys() and self.folder.is_dir():
            _write_cache(cache, looked)
        records = {}
        for summary, problem in looked.values():
            if problem is not None:
                problems.append(f"{self.folder}/{problem}")
            elif summary is not None:
                record = json.loads(summary)
                records[record["run_id"]] = record | {"path": str(self.path(record["run_id"]))}
        found, odd = owners(self.folder, self.stale_after)
        return Contents(records, problems + odd, found)

    def _look(self, run_id: str) -> tuple[dict[str, Any] | None, str | None]:
        path = self.path(run_id)
        return read(path) if path.exists() else (None, None)

    def _check_age(self, run_id: str) -> None:
        """DataError where a newer version of flora has written this run's record, which is then no one else's."""
        try:
            path = self.path(run_id)
            version = json.loads(path.read_bytes())["schema_version"] if path.is_file() else 0
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            return
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise DataError(
                f"{self.path(run_id)} was written by a newer flora (schema version {version}, this code reads "
                f"{SCHEMA_VERSION}): update flora, or choose another folder with paths.results=DIR"
            )


def read(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """A record and None, or None and what is wrong with the file in one line."""
    try:
        return _checked(path, path.read_bytes()) if path.is_file() else (None, f"{path}: not a file")
    except OSError as error:
        return None, f"{path}: not readable ({error.strerror})"


def _checked(path: Path, content: bytes) -> tuple[dict[str, Any] | None, str | None]:
    try:
        record = json.loads(content, object_pairs_hook=_object)
        if b"\\ud" in content.lower():
            json.dumps(record, ensure_ascii=False).encode()
        wrong = fault(record, path.stem)
    except UnicodeEncodeError:
        wrong = "holds half a character (\\ud800 to \\udfff), which no table can show"
    except (ValueError, RecursionError) as error:
        wrong = f"not readable as JSON ({error})"
    return (record, None) if wrong is None else (None, f"{path}: {wrong}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key in found if sum(key == name for name, _ in pairs) > 1)
        raise ValueError(f"{twice!r:.40} stands there twice")
    return found


def _files(folder: Path) -> tuple[list[tuple[str, int, int]], list[str]]:
    """Name, time and size of each file that may be a record, and a line for each other entry of such a name."""
    files, problems = list[tuple[str, int, int]](), list[str]()
    if not folder.is_dir():
        return files, problems
    with os.scandir(folder) as entries:
        for entry in (e for e in entries if e.name.endswith(".json") and not e.name.startswith(".")):
            try:
                entry.name.encode()
                there = entry.stat()
            except UnicodeEncodeError:
                problems.append(f"{shown(Path(entry.path))}: not the name of a record")
            except OSError as error:
                problems.append(f"{entry.path}: not readable ({error.strerror})")
            else:
                if stat.S_ISREG(there.st_mode):
                    files.append((entry.name, there.st_mtime_ns, there.st_size))
                else:
                    problems.append(f"{entry.path}: not a file")
    return sorted(files), sorted(problems)


def _summary(path: Path) -> tuple[str | None, str | None]:
    try:
        content = path.read_bytes()
    except OSError as error:
        return None, f"{path.name}: not readable ({error.strerror})"
    record, problem = _checked(Path(path.name), content)
    if record is None:
        return None, problem
    light = {key: value for key, value in record.items() if key not in _HEAVY}
    data = record.get("data") or {}
    light |= {"data_source": data.get("source"), "split_rule": data.get("split_rule")}
    light |= {"cell_id": recorded_cell(record["config"]), "inputs": record["config"].get("inputs") or {}}
    return json.dumps(light | {"sha256": hashlib.sha256(content).hexdigest()}), None


_COLUMNS = ("name", "mtime_ns", "size", "summary", "problem")


def _read_cache(path: Path) -> dict[tuple[str, int, int], tuple[Any, Any]]:
    try:
        table = pq.read_table(path)
        columns = [table.column(name).to_pylist() for name in _COLUMNS]
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return {}
    said = table.schema.metadata or {}
    if said.get(b"version") != _CACHE_VERSION or said.get(b"sha256") != _sum(columns):
        return {}
    return {(name, mtime, size): (text, problem) for name, mtime, size, text, problem in zip(*columns, strict=True)}


def _write_cache(path: Path, looked: dict[tuple[str, int, int], tuple[Any, Any]]) -> None:
    """Best effort, atomically: a folder that cannot be written is read whole each time."""
    columns = [[*key, *value] for key, value in looked.items()]
    columns = [list(column) for column in zip(*columns, strict=True)] or [[] for _ in _COLUMNS]
    types = (pa.string(), pa.int64(), pa.int64(), pa.string(), pa.string())
    table = pa.table(
        {name: pa.array(column, kind) for name, column, kind in zip(_COLUMNS, columns, types, strict=True)},
        metadata={b"version": _CACHE_VERSION, b"sha256": _sum(columns)},
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        pq.write_table(table, temporary)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)


def _sum(columns: list[list[Any]]) -> bytes:
    return hashlib.sha256(json.dumps(columns).encode()).hexdigest().encode()
