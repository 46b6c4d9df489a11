"""A VTAB dataset's folder: parquet files or official lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flora.errors import DataError
from flora.tasks import manifest
from flora.tasks.images import parquet
from flora.tasks.images.decode import Pool
from flora.tasks.vtab import lists
from flora.tasks.vtab.datasets import DATASETS, DatasetInfo
from flora.tasks.vtab.rendered import RENDERED


def open_folder(
    folder: Path, info: DatasetInfo, source: str = "paths.data"
) -> tuple[dict[str, Pool], list[str], dict[str, Any]]:
    """Pools, class names and facts of a folder of parquet files or official lists.

    Raises:
        DataError: for files that are missing, have changed or do not fit.
    """
    if lists.in_folder(folder):
        return lists.open_folder(folder, info.classes)
    paths = tables(folder)
    everything = [path for members in paths.values() for path in members]
    manifest.check(folder, everything)
    names = (
        parquet.read_class_names(everything, info.classes)
        if info.column == "label"
        else [str(info.first + c) for c in range(info.classes)]
    )
    pools: dict[str, Pool] = {}
    files: dict[str, Any] = {}
    for split, members in paths.items():
        if members:
            pools[split], of_files = parquet.open_pool(members, names, info.column, info.first)
            files |= of_files
    facts = {"source": source, "files": files}
    if info.folder == "nlvr":
        shared = parquet.shared_rows(paths["test"], [*paths["train"], *paths["validation"]])
        if len(shared) == len(pools["test"]):
            raise DataError(f"{folder}: every image of test is in train or validation as well; fetch it again")
        pools["test"] = pools["test"].without(shared)
        facts["left_out"] = {"test": len(shared), "why": "their images are in train or validation"}
    return pools, names, facts


def tables(folder: Path) -> dict[str, list[Path]]:
    """The parquet files of each split; DataError where train or test has none."""
    paths = {split: sorted(folder.rglob(f"{split}*.parquet")) for split in ("train", "validation", "test")}
    for split in ("train", "test"):
        if not paths[split]:
            raise DataError(f"{folder}: no {split}*.parquet; add it, or remove the folder to have it downloaded")
    return paths


def available(data_dir: Path | None) -> str:
    """What can be used without a network, in words, for an error message."""
    ready = []
    if data_dir is not None:
        ready = [name for name in DATASETS if parquet.has_splits(Path(data_dir) / name)]
    folders = f"; in {data_dir}: {', '.join(ready)}" if ready else ""
    return f"available offline without a file: {', '.join(RENDERED)}{folders}"
