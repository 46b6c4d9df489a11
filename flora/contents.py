"""What files hold, as checksums that are cheap to ask for again."""

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from flora.files import cache_dir, write_json

_THREADS = 8
SETTLED_NS = 2_000_000_000  # a file changed more recently may change again without another time
_notes: ContextVar[dict[Path, bool] | None] = ContextVar("notes", default=None)
UNREADABLE = "unreadable"
IMAGES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")  # names of images end so
NO_IMAGES = (".parquet", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".txt", ".md", ".yaml", ".yml")
_SAID_FROM = 1 << 30  # bytes that are read without a word


def of(folder: Path, files: Collection[Path]) -> dict[str, str]:
    """What decides a data set that lies in tables: the checksum of each, and one of all images beside them.

    Args:
        folder: of the data set.
        files: the tables, within it, which may name images by any name.

    Returns:
        64 hex digits by name; ``images`` where there are any.
    """
    beside = [path for path in everything(folder) if path.suffix.lower() not in NO_IMAGES]
    return digests(files, folder) | ({"images": checksum(beside, folder)} if beside else {})


def everything(folder: Path) -> list[Path]:
    """All files below a folder but hidden ones, also behind links, sorted."""
    found, seen = list[Path](), set[str]()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [name for name in folders if not name.startswith(".")] if real not in seen else []
        if real not in seen:
            found += [Path(place, name) for name in names if not name.startswith(".")]
        seen.add(real)
    return sorted(path for path in found if path.is_file())


def checksum(files: Iterable[Path], root: Path, deep: bool = True) -> str:
    """Sha256 over the names, sizes and contents of files; the same for the same files in another place or order.

    Args:
        files: any number; one that cannot be read counts as such.
        root: the folder that their names start from.
        deep: they were found anywhere in it, not in itself alone.

    Returns:
        64 hex digits.
    """
    whole = hashlib.sha256()
    for name, (size, *_, digest) in _looked(files, root, deep).items():
        whole.update(json.dumps([name, size, digest]).encode() + b"\n")
    return whole.hexdigest()


def digests(files: Iterable[Path], root: Path, deep: bool = True) -> dict[str, str]:
    """Sha256 of each file, by its name seen from ``root``; ``UNREADABLE`` for one that cannot be read."""
    return {name: entry[-1] for name, entry in _looked(files, root, deep).items()}


@contextlib.contextmanager
def noted() -> Iterator[dict[Path, bool]]:
    """The folders whose files are asked for inside, each with whether these lie anywhere in it or in itself alone."""
    notes: dict[Path, bool] = {}
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def note(root: Path, deep: bool) -> None:
    """Files of a folder are asked for."""
    if (notes := _notes.get()) is not None:
        notes[root] = notes.get(root, False) or deep


def state(folder: Path, deep: bool) -> tuple[str, int]:
    """What changes with the names, sizes or times of anything in a folder, and the newest of those times, in ns."""
    entries, newest, ahead, seen = list[list[Any]](), 0, [folder], set[str]()
    while ahead:
        place = ahead.pop()
        stat = _stat(place)
        entries.append([str(place), *stat])
        newest = max(newest, *stat[1:3], 0)
        if not stat or os.path.realpath(place) in seen:
            continue
        seen.add(os.path.realpath(place))
        for entry in os.scandir(place):
            if entry.is_dir():
                ahead += [Path(entry.path)] if deep else []
            else:
                entries.append([entry.path, *_stat(Path(entry.path))])
                newest = max(newest, *entries[-1][2:4], 0)
    return hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest(), newest


def _looked(files: Iterable[Path], root: Path, deep: bool) -> dict[str, list[Any]]:
    """Size, times and checksum of files by name, in the order of the names.

    They are kept in FLORA_CACHE: a file is read again only where its size or its times have changed.
    """
    note(root, deep)
    known = _known(root)
    named = sorted((Path(os.path.relpath(path, root)).as_posix(), path) for path in files)
    stats = {name: _stat(path) if path.is_file() else [] for name, path in named}  # a pipe would be waited for
    unread = [(name, path) for name, path in named if stats[name] and known.get(name, [])[:4] != stats[name]]
    if (size := sum(stats[name][0] for name, _ in unread)) > _SAID_FROM:
        print(f"{root}: reading {len(unread)} files, {size / 1e9:.1f} GB, once for their checksum", file=sys.stderr)
    with ThreadPoolExecutor(_THREADS) as pool:
        contents = list(pool.map(_content, (path for _, path in unread)))
    known |= {name: [*stats[name], digest] for (name, _), digest in zip(unread, contents, strict=True)}
    if unread:
        settled = time.time_ns() - SETTLED_NS
        _keep(root, {name: entry for name, entry in known.items() if max(entry[1:3]) < settled})
    return {name: known[name] if stat else [0, UNREADABLE] for name, stat in stats.items()}


def _stat(path: Path) -> list[int]:
    try:
        stat = path.stat()
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _content(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return UNREADABLE


def _cache(root: Path) -> Path:
    return cache_dir() / "contents" / f"{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]}.json"


def _known(root: Path) -> dict[str, list[Any]]:
    """Size, times and checksum of files, as ``_keep`` wrote them; nothing where that is damaged."""
    try:
        kept = json.loads(_cache(root).read_bytes())
        return kept["files"] if kept["sha256"] == _sum(kept["files"]) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _keep(root: Path, files: dict[str, list[Any]]) -> None:
    try:
        write_json(_cache(root), {"sha256": _sum(files), "files": files})
    except OSError as error:
        print(f"warning: {_cache(root)} cannot be written ({error.strerror}): files are read again", file=sys.stderr)


def _sum(files: dict[str, list[Any]]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
