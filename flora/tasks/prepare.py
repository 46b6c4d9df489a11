"""Filling the data folder: where each dataset can come from, what it must hold, and the manifest that says so."""

from __future__ import annotations

import difflib
import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features
from datasets import Image as ImageFeature
from filelock import FileLock

from flora.errors import ConfigError, DataError, FloraError, WeightsError
from flora.models.weights import download_wheel, sha256_of
from flora.tasks import download, glue, manifest
from flora.tasks.commonsense import task as commonsense
from flora.tasks.images import Pool
from flora.tasks.vqa import dialogues
from flora.tasks.vtab import task as vtab

# VTAB's test sets (Zhai et al. 2019, table 2); stand-ins have no official numbers.
_VTAB_TEST = {
    "caltech101": 6084,
    "cifar100": 10000,
    "dtd": 1880,
    "flowers102": 6149,
    "pets": 3669,
    "sun397": 21750,
    "svhn": 26032,
    "patch_camelyon": 32768,
    "eurosat": 5400,
    "resisc45": 6300,
    "diabetic_retinopathy": 42670,
    "clevr_count": 15000,
    "clevr_distance": 15000,
    "dmlab": 22735,
    "kitti": 711,
    "smallnorb_azimuth": 12150,
    "smallnorb_elevation": 12150,
}
_EASY_VQA = "easy-vqa==1.0"  # MIT; its wheel carries the images
_EASY_VQA_SHA256 = "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"
_ROWS = 1000  # of a row group: as many encoded images are held at a time


@dataclass(frozen=True)
class Item:
    """A dataset to prepare.

    Attributes:
        name: what the user types; also its folder in the data folder.
        others: names of its folder elsewhere.
        rows: official number of rows of each split; empty for stand-ins.
        classes: official number; 0 for regressions and questions.
        read: folder -> number of rows and of classes that occur, of each split; raises DataError on bad files.
        fetch: makes the files of a folder from what can be reached, and says where they come from.
    """

    name: str
    others: tuple[str, ...]
    rows: dict[str, int]
    classes: int
    read: Callable[[Path], dict[str, tuple[int, int]]]
    fetch: Callable[[Path], str]


def catalogue() -> dict[str, Item]:
    """Every dataset, by name; those that are rendered need no file and are left out."""
    found = [*map(_glue, glue.DATASETS), *map(_commonsense, commonsense.DATASETS)]
    found += [_vtab(name) for name in vtab.DATASETS if name not in vtab.RENDERED]
    found += [
        Item("easy_vqa", (), {"train": 38575, "test": 9673}, 13, _questions(dialogues.easy_vqa), _fetch_easy_vqa),
        Item("nlvr", (), {}, 2, _questions(dialogues.nlvr), _no_server("nlvr")),
    ]
    return {item.name: item for item in found}


def find(name: str) -> Item:
    """A dataset by name, ConfigError with near names if there is none."""
    items = catalogue()
    if name in items:
        return items[name]
    close = difflib.get_close_matches(name, items, cutoff=0.5)
    raise ConfigError(
        f"dataset {name!r} is unknown: " + (f"did you mean {' or '.join(close)}?" if close else "see --list")
    )


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
            found = state(item, data)
            if found == "ready":
                known = manifest.read(folder)
                lost = [name for name in known["files"] if not (folder / name).is_file()]
                if lost:
                    raise DataError(f"{folder}: {lost[0]} is gone; remove the folder and prepare it again")
                manifest.check(folder, [folder / name for name in known["files"]])
                return known
            if found == "without manifest":
                return _describe(item, folder, "found there")
            fresh = folder.parent / f".{folder.name}.fresh"
            shutil.rmtree(fresh, ignore_errors=True)  # of a run that was interrupted
            fresh.mkdir()
            try:
                content = _describe(item, fresh, _fill(item, fresh, source))
                os.replace(fresh, folder)
            except DataError as error:
                raise DataError(str(error).replace(str(fresh), f"{source or 'the download'}: {item.name}")) from error
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
            return content
    except OSError as error:
        raise DataError(f"{folder} cannot be prepared: {error}") from error


def _fill(item: Item, fresh: Path, source: Path | None) -> str:
    if source is None:
        return item.fetch(fresh)
    names = list(dict.fromkeys((item.name, *item.others)))
    place = next((source / name for name in names if (source / name).is_dir()), None)
    if place is None:
        raise DataError(f"{source} has no folder {' or '.join(names)}")
    shutil.copytree(place, fresh, dirs_exist_ok=True, ignore=shutil.ignore_patterns(manifest.NAME))
    return "copied"


def _describe(item: Item, folder: Path, source: str) -> dict[str, Any]:
    """Check what lies in a folder and write its manifest."""
    found = item.read(folder)
    rows = {split: count for split, (count, _) in found.items()}
    classes = max(number for _, number in found.values())
    warnings = [f"{s}: {rows.get(s, 0)} rows, officially {n}" for s, n in item.rows.items() if rows.get(s, 0) != n]
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
        "files": {
            str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256_of(p)}
            for p in files
            if p.name != manifest.NAME
        },
    }
    manifest.write(folder, content)
    return content


def _glue(dataset: str) -> Item:
    task = glue.Glue(name="glue", dataset=dataset, epochs=1, max_length=None, held_out=0)
    entry = task.entry

    def read(folder: Path) -> dict[str, tuple[int, int]]:
        return {s: (len(r), len(np.unique(r.labels))) for s, r in task.read_folder(folder).items()}

    def fetch(folder: Path) -> str:
        try:
            _copy(sorted(task.from_hub().glob("*.parquet")), folder)
        except FloraError as error:
            raise DataError(f"glue/{dataset}: {error}; give a folder that has it with --from") from error
        return f"hub {glue.HUB}"

    return Item(f"glue/{dataset}", (f"glue/{entry.folder}", entry.folder), entry.rows, len(entry.classes), read, fetch)


def _commonsense(dataset: str) -> Item:
    task = commonsense.Commonsense(name="commonsense", dataset=dataset, epochs=1)
    entry = task.entry

    def read(folder: Path) -> dict[str, tuple[int, int]]:
        return {split: (len(task.read_folder(folder, split)[0]), 0) for split in ("train", entry.test)}

    def fetch(folder: Path) -> str:
        try:
            found = task.from_hub()
        except DataError as error:
            raise DataError(f"{dataset}: {error}; give a folder that has it with --from") from error
        for path in sorted(found.rglob("*.parquet")):  # SPLIT/0000.parquet
            shutil.copyfile(path, folder / f"{path.parent.name}-{path.name}")
        return f"hub {entry.hub[0]}"

    rows = dict(zip(("train", entry.test), entry.rows, strict=True))
    return Item(dataset, (entry.folder,), rows, 0, read, fetch)


def _vtab(dataset: str) -> Item:
    entry = vtab.DATASETS[dataset]
    test = _VTAB_TEST.get(dataset)
    sizes = {"train": vtab.TRAIN_SIZE, "validation": vtab.VALIDATION_SIZE} | ({"test": test} if test else {})

    def read(folder: Path) -> dict[str, tuple[int, int]]:
        pools, _, _ = vtab.open_folder(folder, entry)
        return {split: (len(pool), len(np.unique(pool.labels))) for split, pool in pools.items()}

    def fetch(folder: Path) -> str:
        if dataset not in download.SOURCES:
            return _no_server(dataset)(folder)
        pools, names, facts = download.download(dataset, split_seed=0)
        task = vtab.Vtab(name="vtab", dataset=dataset, epochs=1)
        rows, rule, _ = task.choose(pools)
        for split, chosen in rows.items():
            _write_images(pools.get(split, pools["train"]), np.sort(chosen), names, folder / f"{split}.parquet")
        return f"{facts['source']}; {rule}"

    others = (entry.folder,) if entry.folder else ()
    return Item(dataset, others, {} if entry.stands_for else sizes, entry.classes, read, fetch)


def _no_server(dataset: str) -> Callable[[Path], str]:
    def fetch(folder: Path) -> str:
        raise DataError(f"{dataset}: no server offers it to a program; give a folder that has it with --from")

    return fetch


def _questions(ask: Callable[[dialogues.Row], dialogues.Asked]) -> Callable[[Path], dict[str, tuple[int, int]]]:
    """How to read splits of questions about images: classes are the answers that occur."""

    def read(folder: Path) -> dict[str, tuple[int, int]]:
        found = {}
        for path in sorted(folder.glob("*.parquet")):
            rows = dialogues.read_parquet([path], ask, dialogues.Pictures())
            found[path.stem] = len(rows), len({row.answers[0] for row in rows})
        if "train" not in found:
            raise DataError(f"{folder} holds no train.parquet")
        return found

    return read


def _fetch_easy_vqa(folder: Path) -> str:
    """easy-VQA's files out of its package, whose code is not run, as parquet."""
    with tempfile.TemporaryDirectory() as place:
        try:
            wheel = download_wheel(_EASY_VQA, Path(place))
        except WeightsError as error:
            raise DataError(f"easy_vqa: {error}; give a folder that has it with --from") from error
        if (found := sha256_of(wheel)) != _EASY_VQA_SHA256:
            raise DataError(f"easy_vqa: the package index served another file (sha256 {found}); do not use it")
        image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        schema = pa.schema({"image": image, "question": pa.string(), "answer": pa.string()})
        with zipfile.ZipFile(wheel) as archive:
            for split in ("train", "test"):
                root = f"easy_vqa/data/{split}"
                rows = json.loads(archive.read(f"{root}/questions.json"))
                images = {number: archive.read(f"{root}/images/{number}.png") for *_, number in rows}
                columns = {
                    "image": [{"bytes": images[n], "path": f"{split}/{n}.png"} for *_, n in rows],
                    "question": [question for question, *_ in rows],
                    "answer": [answer for _, answer, _ in rows],
                }
                pq.write_table(pa.table(columns, schema=schema), folder / f"{split}.parquet")
    return f"package {_EASY_VQA}"


def _write_images(pool: Pool, rows: np.ndarray, names: list[str], path: Path) -> None:
    """Images as PNG in the parquet layout, a thousand at a time."""
    features = Features(image=ImageFeature(), label=ClassLabel(names=names))
    openers = pool.open_rows(rows)
    with pq.ParquetWriter(path, features.arrow_schema) as writer:
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS]
            cells = []
            for _, open_image in zip(part, openers, strict=False):
                stream = io.BytesIO()
                with open_image() as image:
                    image.convert("RGB").save(stream, "PNG")
                cells.append({"bytes": stream.getvalue(), "path": None})
            columns = {"image": cells, "label": pool.labels[part].tolist()}
            writer.write_table(pa.table(columns, schema=features.arrow_schema))


def _copy(paths: list[Path], folder: Path) -> None:
    for path in paths:
        shutil.copyfile(path, folder / path.name)
