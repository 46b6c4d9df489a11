"""VTAB datasets that torchvision or the hub can download, kept in FLORA_CACHE (by default ~/.cache/flora)."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
from filelock import FileLock
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from PIL import Image
from torch.utils.data import Subset
from torchvision import datasets

from flora.errors import DataError, WeightsError, first_line
from flora.models.weights import reach_hub
from flora.tasks.base import draw
from flora.tasks.images.decode import Pool
from flora.tasks.vtab import kitti, rules
from flora.tasks.vtab.raw import miscounted

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


def _sun397(root: Path, download: bool) -> dict[str, Any]:
    return {"train": datasets.SUN397(root, download=download)}


def _patch_camelyon(root: Path, download: bool) -> dict[str, Any]:
    names = {"train": "train", "validation": "val", "test": "test"}
    return {split: _Labelled.of_pcam(datasets.PCAM(root, name, download=download)) for split, name in names.items()}


def _clevr_count(root: Path, download: bool) -> dict[str, Any]:
    scenes = {split: datasets.CLEVRClassification(root, split, download=download) for split in ("train", "val")}
    labels = {split: [rules.clevr_count(count) for count in members._labels] for split, members in scenes.items()}
    # CLEVR hides the answers of its test set; VTAB tests on the validation set.
    return {"train": _Labelled(scenes["train"], labels["train"]), "test": _Labelled(scenes["val"], labels["val"])}


def _clevr_distance(root: Path, download: bool) -> dict[str, Any]:
    sets = {}
    for split, part in {"train": "train", "test": "val"}.items():
        images = datasets.CLEVRClassification(root, part, download=download)
        scenes = json.loads((images._data_folder / "scenes" / f"CLEVR_{part}_scenes.json").read_text())["scenes"]
        depths = {s["image_filename"]: [shape["pixel_coords"][2] for shape in s["objects"]] for s in scenes}
        labels = [rules.clevr_distance(depths[Path(file).name]) for file in images._image_files]
        sets[split] = _Labelled(images, labels)
    return sets


def _kitti(root: Path, download: bool) -> dict[str, Any]:
    if download:
        kitti.fetch(root)
    images, splits, labels = kitti.load(root)
    return {split: _Labelled(Subset(images, rows), [labels[r] for r in rows]) for split, rows in splits.items()}


class _Labelled:
    """A dataset of torchvision under other labels."""

    def __init__(self, images: Any, targets: Sequence[int]):
        self.images, self.targets = images, targets
        self.classes = [str(label) for label in range(max(targets) + 1)]

    @classmethod
    def of_pcam(cls, images: Any) -> _Labelled:
        with images.h5py.File(images._base_folder / images._FILES[images._split]["targets"][0]) as file:
            return cls(images, [int(label) for label in file["y"][:, 0, 0, 0]])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Any:
        return self.images[row]


@dataclass(frozen=True)
class Download:
    """How torchvision gets a dataset, from which server, and how many images there are when it is complete."""

    load: Callable[[Path, bool], dict[str, Any]]
    server: str
    images: int


SOURCES = {
    "caltech101": Download(_caltech101, "https://data.caltech.edu", 9144),
    "cifar10": Download(_cifar10, "https://www.cs.toronto.edu", 60000),
    "cifar100": Download(_cifar100, "https://www.cs.toronto.edu", 60000),
    "dtd": Download(_dtd, "https://www.robots.ox.ac.uk", 5640),
    "eurosat": Download(_eurosat, "https://huggingface.co", 27000),
    "flowers102": Download(_flowers102, "https://www.robots.ox.ac.uk", 8189),
    "pets": Download(_pets, "https://thor.robots.ox.ac.uk", 7349),
    "clevr_count": Download(_clevr_count, "https://dl.fbaipublicfiles.com", 85000),
    "clevr_distance": Download(_clevr_distance, "https://dl.fbaipublicfiles.com", 85000),
    "kitti": Download(_kitti, "https://s3.eu-central-1.amazonaws.com", 7481),
    "patch_camelyon": Download(_patch_camelyon, "https://drive.google.com", 327680),
    "sun397": Download(_sun397, "http://vision.princeton.edu", 108754),
    "svhn": Download(_svhn, "http://ufldl.stanford.edu", 99289),
}


def from_hub(repository: str) -> Path:
    """The folder with a hub dataset's parquet files, fetched unless the cache has it; DataError if it cannot be had."""
    options: dict[str, Any] = {"repo_type": "dataset", "allow_patterns": "*.parquet"}
    try:
        return Path(huggingface_hub.snapshot_download(repository, local_files_only=True, **options))
    except LocalEntryNotFoundError:
        pass
    try:
        reach_hub()
        return Path(huggingface_hub.snapshot_download(repository, **options))
    except (WeightsError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(f"hub {repository}: {first_line(error)}") from error


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
        # Processes and sweeps start at once: the first one downloads, the others wait and then find it.
        with FileLock(root / f"{dataset}.lock"):
            sets = _load(dataset, source, root)
    except (RuntimeError, OSError, ImportError) as error:
        raise DataError(f"the download of {dataset} from {source.server} failed ({first_line(error)})") from error
    count = sum(map(len, sets.values()))
    if count != source.images:
        # torchvision takes a half-unpacked folder for a whole one.
        raise DataError(f"{root} holds {count} of its {source.images} images: remove them there and try again")
    pools = {split: _pool(members, np.arange(len(members))) for split, members in sets.items()}
    if wrong := miscounted(dataset, pools):
        raise DataError(f"{root}: {dataset} has not its official splits ({'; '.join(wrong)}): remove it and try again")
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


def _load(dataset: str, source: Download, root: Path) -> dict[str, Any]:
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
