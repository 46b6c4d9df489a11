"""The datasets that can be prepared: what each must hold, and where it can come from."""

from __future__ import annotations

import difflib
import io
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features
from datasets import Image as ImageFeature
from PIL import Image

from flora.errors import ConfigError, DataError, FloraError
from flora.tasks.commonsense import files as commonsense_files
from flora.tasks.commonsense import questions
from flora.tasks.glue import datasets as glue_datasets
from flora.tasks.glue import files as glue_files
from flora.tasks.images.decode import Pool
from flora.tasks.prepare import easy_vqa, texts
from flora.tasks.vqa import dialogues
from flora.tasks.vtab import datasets as vtab_datasets
from flora.tasks.vtab import download, raw
from flora.tasks.vtab import files as vtab_files
from flora.tasks.vtab.rendered import RENDERED
from flora.tasks.vtab.task import Vtab

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
# Folders that hold several data sets as they are published.
_TOGETHER = {"smallnorb_azimuth": ("smallnorb",), "smallnorb_elevation": ("smallnorb",)}


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
        shared_texts: folder -> what two splits share, as ``flora.tasks.prepare.texts`` counts it; None: not counted.
        convert: makes them from a folder as the data set's publishers pack it, and gives warnings of its counts; gives
            None where it is packed otherwise. None: no such packing is known.
        pictures: folder -> functions that open the images of each split; None: the data set has none.
    """

    name: str
    others: tuple[str, ...]
    rows: dict[str, int]
    classes: int
    read: Callable[[Path], dict[str, tuple[int, int]]]
    fetch: Callable[[Path], str]
    shared_texts: Callable[[Path], dict[str, dict[str, int]]] | None = None
    convert: Callable[[Path, Path], list[str] | None] | None = None
    pictures: Callable[[Path], dict[str, list[Callable[[], Image.Image]]]] | None = None


def catalogue() -> dict[str, Item]:
    """Every dataset, by name; those that are rendered need no file and are left out."""
    items = [*map(_glue, glue_datasets.DATASETS), *map(_commonsense, questions.EIGHT)]
    items += [_vtab(name) for name in vtab_datasets.DATASETS if name not in RENDERED]
    items += [
        _about_images("easy_vqa", {"train": 38575, "test": 9673}, 13, dialogues.easy_vqa, easy_vqa.fetch),
        _about_images("nlvr", {}, 2, dialogues.nlvr, _no_server("nlvr")),
    ]
    return {item.name: item for item in items}


def find(name: str) -> Item:
    """A dataset by name, ConfigError with near names if there is none."""
    items = catalogue()
    if name in items:
        return items[name]
    close = difflib.get_close_matches(name, items, cutoff=0.5)
    raise ConfigError(
        f"dataset {name!r} is unknown: " + (f"did you mean {' or '.join(close)}?" if close else "see --list")
    )


def _glue(dataset: str) -> Item:
    info = glue_datasets.DATASETS[dataset]

    def read(folder: Path) -> dict[str, tuple[int, int]]:
        return {s: (len(r), len(np.unique(r.labels))) for s, r in glue_files.read_folder(folder, info).items()}

    def fetch(folder: Path) -> str:
        try:
            for path in sorted(glue_files.from_hub(dataset).glob("*.parquet")):
                shutil.copyfile(path, folder / path.name)
        except FloraError as error:
            raise DataError(f"glue/{dataset}: {error}; give a folder that has it with --from") from error
        return f"hub {glue_files.HUB}"

    def shared(folder: Path) -> dict[str, dict[str, int]]:
        return texts.count(glue_files.read_folder(folder, info))

    others = (f"glue/{info.folder}", info.folder)
    return Item(f"glue/{dataset}", others, info.rows, len(info.classes), read, fetch, shared_texts=shared)


def _commonsense(dataset: str) -> Item:
    info = questions.DATASETS[dataset]

    def read(folder: Path) -> dict[str, tuple[int, int]]:
        splits = ("train", info.test)
        return {split: (len(commonsense_files.read_folder(folder, info, split)[0]), 0) for split in splits}

    def fetch(folder: Path) -> str:
        try:
            copy = commonsense_files.from_hub(info)
        except DataError as error:
            raise DataError(f"{dataset}: {error}; give a folder that has it with --from") from error
        for path in sorted(copy.rglob("*.parquet")):  # SPLIT/0000.parquet
            shutil.copyfile(path, folder / f"{path.parent.name}-{path.name}")
        return f"hub {info.hub[0]}"

    rows = dict(zip(("train", info.test), info.rows, strict=True))
    return Item(dataset, (info.folder,), rows, 0, read, fetch)


def _vtab(dataset: str) -> Item:
    info = vtab_datasets.DATASETS[dataset]
    test = _VTAB_TEST.get(dataset)
    sizes = {"train": vtab_datasets.TRAIN_SIZE, "validation": vtab_datasets.VALIDATION_SIZE} | (
        {"test": test} if test else {}
    )

    def read(folder: Path) -> dict[str, tuple[int, int]]:
        pools, _, _ = vtab_files.open_folder(folder, info)
        return {split: (len(pool), len(np.unique(pool.labels))) for split, pool in pools.items()}

    def fetch(folder: Path) -> str:
        if dataset not in download.SOURCES:
            return _no_server(dataset)(folder)
        pools, names, facts = download.download(dataset, split_seed=0)
        return f"{facts['source']}; {write(pools, names, folder)}"

    def write(pools: dict[str, Pool], names: list[str], folder: Path) -> str:
        rows, rule, _ = Vtab(name="vtab", dataset=dataset, epochs=1).choose(pools)
        for split, chosen in rows.items():
            _write_images(pools.get(split, pools["train"]), np.sort(chosen), names, folder / f"{split}.parquet")
        return rule

    def convert(place: Path, folder: Path) -> list[str] | None:
        published = raw.read(dataset, place)
        if published is None:
            return None
        write(*published, folder)
        return raw.miscounted(dataset, published[0])

    def pictures(folder: Path) -> dict[str, list[Callable[[], Image.Image]]]:
        pools, _, _ = vtab_files.open_folder(folder, info)
        return {split: list(pool.open_rows(np.arange(len(pool)))) for split, pool in pools.items()}

    others = (info.folder, *_TOGETHER.get(dataset, ())) if info.folder else ()
    return Item(
        dataset, others, {} if info.stands_for else sizes, info.classes, read, fetch, convert=convert, pictures=pictures
    )


def _no_server(dataset: str) -> Callable[[Path], str]:
    def fetch(folder: Path) -> str:
        raise DataError(f"{dataset}: no server is asked for it; give a folder that has it with --from")

    return fetch


def _about_images(
    name: str,
    official: dict[str, int],
    classes: int,
    ask: Callable[[dialogues.Row], dialogues.Asked],
    fetch: Callable[[Path], str],
) -> Item:
    """Questions about images in parquet files: classes are the answers that occur."""

    def read(folder: Path) -> dict[str, tuple[int, int]]:
        splits = {}
        for path in sorted(folder.glob("*.parquet")):
            rows = dialogues.read_parquet([path], ask, dialogues.Pictures())
            splits[path.stem] = len(rows), len({row.answers[0] for row in rows})
        if "train" not in splits:
            raise DataError(f"{folder} holds no train.parquet")
        return splits

    def pictures(folder: Path) -> dict[str, list[Callable[[], Image.Image]]]:
        opened = {}
        for split in ("train", "validation", "test"):
            if (path := folder / f"{split}.parquet").is_file():
                found = dialogues.Pictures()  # each image once, whatever is asked about it
                dialogues.read_parquet([path], ask, found)
                opened[split] = found.openers
        return opened

    return Item(name, (), official, classes, read, fetch, pictures=pictures)


_ROWS = 1000  # of a row group: as many encoded images are held at a time


def _write_images(pool: Pool, rows: np.ndarray, names: list[str], path: Path) -> None:
    """Images in the parquet layout, a thousand at a time."""
    features = Features(image=ImageFeature(), label=ClassLabel(names=names))
    openers = pool.open_rows(rows)
    with pq.ParquetWriter(path, features.arrow_schema) as writer:
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS]
            cells = []
            for _, open_image in zip(part, openers, strict=False):
                with open_image() as image:
                    cells.append({"bytes": _encoded(image), "path": None})
            columns = {"image": cells, "label": pool.labels[part].tolist()}
            writer.write_table(pa.table(columns, schema=features.arrow_schema))


def _encoded(image: Image.Image) -> bytes:
    """The file of a JPEG as it is, anything else as PNG."""
    stream = getattr(image, "fp", None)
    if image.format == "JPEG" and stream is not None:
        stream.seek(0)
        return stream.read()
    target = io.BytesIO()
    image.convert("RGB").save(target, "PNG")
    return target.getvalue()
