"""A GLUE dataset's folder: the hub's parquet files or the official TSVs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from flora.errors import DataError, WeightsError, first_line
from flora.models.weights import reach_hub, sha256_of
from flora.tasks import manifest
from flora.tasks.glue.datasets import DatasetInfo
from flora.tasks.text.rows import Rows, check_labels, check_texts, read_parquet, row_of

HUB = "nyu-mll/glue"
_SIMILARITY = (0.0, 5.0)


def tables(folder: Path, info: DatasetInfo) -> dict[str, list[Path]]:
    """The files of each split: parquet, or the official TSV."""
    if any(folder.glob("*.parquet")):
        return {split: sorted(folder.glob(f"{split}*.parquet")) for split in info.rows}
    names = {"train": "train", "validation": "dev"}
    return {split: [folder / f"{names.get(split, split.replace('validation', 'dev'))}.tsv"] for split in info.rows}


def read_folder(folder: Path, info: DatasetInfo) -> dict[str, Rows]:
    """The rows of each split, from parquet or the official TSVs."""
    splits = {}
    for split, paths in tables(folder, info).items():
        if not paths:
            raise DataError(f"{folder}: no {split}*.parquet; fetch the dataset again")
        manifest.check(folder, paths)
        if paths[0].suffix == ".tsv":
            splits[split] = _read_tsv(paths[0], info)
        else:
            splits[split] = read_parquet(paths, info.columns, len(info.classes), _SIMILARITY)
    return splits


def from_hub(dataset: str) -> Path:
    """The folder of the hub's cache with the dataset's files; WeightsError where they cannot be had."""
    pattern = f"{dataset}/*.parquet"
    options: dict[str, Any] = {"repo_type": "dataset", "allow_patterns": pattern}
    try:
        folder = Path(huggingface_hub.snapshot_download(HUB, local_files_only=True, **options)) / dataset
        if any(folder.glob("train*.parquet")):
            return folder
    except LocalEntryNotFoundError:
        pass
    reach_hub()
    try:
        return Path(huggingface_hub.snapshot_download(HUB, **options)) / dataset
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise WeightsError(first_line(error)) from error


def _read_tsv(path: Path, info: DatasetInfo) -> Rows:
    """An official TSV: no quoting, a header except in CoLA; rows of another width are left out and counted."""
    try:
        # MRPC's official files begin with a byte order mark.
        lines = [line.split("\t") for line in path.read_text(encoding="utf-8-sig").split("\n") if line]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from error
    header: list[Any] = [] if isinstance(info.label, int) else (lines or [[]])[0]
    rows = lines[1:] if header else lines
    missing = [name for name in (*info.tsv, info.label) if header and name not in header]
    width = len(header or (rows or [[]])[0])
    whole = [row for row in rows if len(row) == width]
    if missing or not whole:
        what = f"no column {' and '.join(map(str, missing))}" if missing else f"no rows of {width} columns"
        raise DataError(f"{path}: {what}; fetch the file again")
    places = [header.index(name) if header else int(name) for name in (*info.tsv, info.label)]
    *columns, labels = [[row[place] for row in whole] for place in places]
    numbers = [info.classes.index(label) if label in info.classes else label for label in labels]
    where = partial(row_of, path)
    facts: dict[str, Any] = {"rows": len(whole), "sha256": sha256_of(path)}
    if len(whole) < len(rows):
        facts["left_out"] = len(rows) - len(whole)
    return Rows(
        check_texts(columns, [str(name) for name in info.tsv], where),
        check_labels(numbers, len(info.classes), _SIMILARITY, where),
        {"files": {path.name: facts}},
    )
