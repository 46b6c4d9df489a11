"""VTAB datasets that torchvision can download, kept in FLORA_CACHE (by default ~/.cache/flora)."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image
from torchvision import datasets

from flora.errors import DataError
from flora.tasks.base import draw
from flora.tasks.images import Pool, one_line

_TIMEOUT_S = 5
_CALTECH_TRAIN_PER_CLASS = 30


def _cifar100(root: Path, download: bool) -> dict[str, Any]:
    return {"train": datasets.CIFAR100(root, True, download=download), "test": datasets.CIFAR100(root, False)}


def _cifar10(root: Path, download: bool) -> dict[str, Any]:
    return {"train": datasets.CIFAR10(root, True, download=download), "test": datasets.CIFAR10(root, False)}


def _dtd(root: Path, download: bool) -> dict[str, Any]:
    names = {"train": "train", "validation": "val", "test": "test"}
    return {split: datasets.DTD(root, name, download=download) for split, name in names.items()}


def _flowers102(root: Path, download: bool) -> dict[str, Any]:
    names = {"train": "train", "validation": "val", "test": "test"}
    return {split: datasets.Flowers102(root, name, download=download) for split, name in names.items()}


def _pets(root: Path, download: bool) -> dict[str, Any]:
    names = {"train": "trainval", "test": "test"}
    return {split: datasets.OxfordIIITPet(root, name, download=download) for split, name in names.items()}


def _svhn(root: Path, download: bool) -> dict[str, Any]:
    return {split: datasets.SVHN(str(root), split, download=download) for split in ("train", "test")}


def _eurosat(root: Path, download: bool) -> dict[str, Any]:
    return {"train": datasets.EuroSAT(root, download=download)}


def _caltech101(root: Path, download: bool) -> dict[str, Any]:
    unpacked = datasets.Caltech101(root, download=download).root
    # torchvision's class drops the background images; VTAB counts them as the 102nd class.
    return {"train": datasets.ImageFolder(str(Path(unpacked) / "101_ObjectCategories"))}


@dataclass(frozen=True)
class Source:
    """How torchvision gets a dataset, from which server, and how many images there are when it is complete."""

    load: Callable[[Path, bool], dict[str, Any]]
    server: str
    images: int


SOURCES = {
    "caltech101": Source(_caltech101, "https://data.caltech.edu", 9144),
    "cifar10": Source(_cifar10, "https://www.cs.toronto.edu", 60000),
    "cifar100": Source(_cifar100, "https://www.cs.toronto.edu", 60000),
    "dtd": Source(_dtd, "https://www.robots.ox.ac.uk", 5640),
    "eurosat": Source(_eurosat, "https://huggingface.co", 27000),
    "flowers102": Source(_flowers102, "https://www.robots.ox.ac.uk", 8189),
    "pets": Source(_pets, "https://thor.robots.ox.ac.uk", 7349),
    "svhn": Source(_svhn, "http://ufldl.stanford.edu", 99289),
}


def download(dataset: str, split_seed: int) -> tuple[dict[str, Pool], list[str], dict[str, Any]]:
    """Fetch a dataset, unless the cache has it.

    Args:
        dataset: a key of SOURCES.
        split_seed: of the draw that makes Caltech101's test set, which has no official one.

    Returns:
        Pools ``train`` and, where there are official ones, ``validation`` and ``test``; class names; facts.

    Raises:
        DataError: if the server does not answer within seconds, or the download fails.
    """
    source = SOURCES[dataset]
    cache = Path(os.environ.get("FLORA_CACHE") or Path.home() / ".cache" / "flora")
    root = cache.expanduser() / "datasets"
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Ranks and sweeps start at once: the first one downloads, the others wait and then find it.
        with FileLock(root / f"{dataset}.lock"):
            sets = _load(dataset, source, root)
    except (RuntimeError, OSError) as error:
        raise DataError(f"the download of {dataset} from {source.server} failed ({one_line(error)})") from error
    found = sum(map(len, sets.values()))
    if found != source.images:
        # torchvision takes a half-unpacked folder for a whole one.
        raise DataError(f"{root} holds {found} of its {source.images} images: remove them there and try again")
    pools = {split: _pool(members, np.arange(len(members))) for split, members in sets.items()}
    names = getattr(sets["train"], "classes", None) or [str(c) for c in range(int(pools["train"].labels.max()) + 1)]
    facts: dict[str, Any] = {"source": f"torchvision, {source.server}"}
    if dataset == "caltech101":
        # As in tensorflow_datasets, which VTAB reads: 30 images of every class to train, the rest to test.
        labels = pools["train"].labels
        order = draw(len(labels), split_seed)
        rank = np.empty(len(labels), int)
        for c in np.unique(labels):
            members = order[labels[order] == c]
            rank[members] = np.arange(len(members))
        for_training = rank < _CALTECH_TRAIN_PER_CLASS
        pools = {
            "train": _pool(sets["train"], np.flatnonzero(for_training)),
            "test": _pool(sets["train"], np.flatnonzero(~for_training)),
        }
        facts["pool_rule"] = f"{_CALTECH_TRAIN_PER_CLASS} of each class drawn for training, seed {split_seed}"
    return pools, list(names), facts


def _load(dataset: str, source: Source, root: Path) -> dict[str, Any]:
    try:
        return source.load(root, False)
    except (RuntimeError, OSError):
        _ask(dataset, source.server)
        return source.load(root, True)


def _ask(dataset: str, server: str) -> None:
    try:
        urllib.request.urlopen(urllib.request.Request(server, method="HEAD"), timeout=_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # it answers, if not to this question
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise DataError(f"{server} cannot be reached to download {dataset} ({reason})") from error


def _pool(dataset: Any, rows: np.ndarray) -> Pool:
    labels = next(
        getattr(dataset, name) for name in ("targets", "labels", "_labels") if getattr(dataset, name, None) is not None
    )

    def open_rows(chosen: np.ndarray) -> Iterator[Callable[[], Image.Image]]:
        for row in rows[chosen]:
            yield partial(_image, dataset, int(row))

    return Pool(
        np.asarray(labels, np.int64)[rows], open_rows, lambda row: f"{type(dataset).__name__}, image {rows[row]}"
    )


def _image(dataset: Any, row: int) -> Image.Image:
    return dataset[row][0]
