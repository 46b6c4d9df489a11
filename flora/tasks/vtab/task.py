"""VTAB-1K: 19 image datasets, 800 images to train, 200 to choose on, the whole test set once.

Zhai et al. 2019, "A Large-scale Study of Representation Learning with the Visual Task Adaptation Benchmark", arXiv
1910.04867. Dataset names, class counts and the label rules follow it; the draws of 800 and 200 are ours unless the
files hold the official ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flora.errors import ConfigError, DataError
from flora.tasks import manifest, parquet
from flora.tasks.aliases import VTAB as ALIASES
from flora.tasks.base import ImageTask, Splits, check_dataset, draw
from flora.tasks.download import SOURCES, download, from_hub
from flora.tasks.images import Pool, decode, from_grey
from flora.tasks.vtab import dsprites, lists

TRAIN_SIZE, VALIDATION_SIZE = 800, 200
RENDERED_TEST_SIZE = 2000
HELD_OUT = 0.2


@dataclass(frozen=True)
class Entry:
    """One dataset: VTAB's group and class count, and the strongest augmentation that keeps its labels true.

    ``stands_for`` names the VTAB dataset that a stand-in replaces where that one cannot be had. ``folder`` is its name
    in published folders of official lists. ``column`` holds the labels, ``first`` is that of class 0.
    """

    group: str
    classes: int
    augment: str = "crop_flip"
    stands_for: str | None = None
    folder: str | None = None
    column: str = "label"
    first: int = 0


# A crop moves what distance, count and centre labels depend on; a flip turns digits and directions into others.
DATASETS = {
    "caltech101": Entry("natural", 102),
    "cifar100": Entry("natural", 100, folder="cifar"),
    "dtd": Entry("natural", 47),
    "flowers102": Entry("natural", 102, folder="oxford_flowers102"),
    "pets": Entry("natural", 37, folder="oxford_iiit_pet"),
    "sun397": Entry("natural", 397),
    "svhn": Entry("natural", 10, "crop"),
    "patch_camelyon": Entry("specialized", 2, "flip"),
    "eurosat": Entry("specialized", 10),
    "resisc45": Entry("specialized", 45),
    "diabetic_retinopathy": Entry("specialized", 5),
    "clevr_count": Entry("structured", 8, "flip"),
    "clevr_distance": Entry("structured", 6, "flip", folder="clevr_dist"),
    "dmlab": Entry("structured", 6, "flip"),
    "kitti": Entry("structured", 4, "flip"),
    "dsprites_location": Entry("structured", 16, "none", folder="dsprites_loc"),
    "dsprites_orientation": Entry("structured", 16, "none", folder="dsprites_ori"),
    "smallnorb_azimuth": Entry("structured", 18, "none", folder="smallnorb_azi"),
    "smallnorb_elevation": Entry("structured", 9, "flip", folder="smallnorb_ele"),
    "cifar10": Entry("natural", 10, stands_for="cifar100"),
    "dtd10": Entry("natural", 10, stands_for="dtd"),
    "rsscn7": Entry("specialized", 7, stands_for="resisc45"),
    "nlvr_count": Entry("structured", 18, "flip", "clevr_count", folder="nlvr", column="num_objects", first=3),
}
RENDERED = {
    "dsprites_location": (dsprites.location_labels, dsprites.POSITIONS),
    "dsprites_orientation": (dsprites.orientation_labels, len(dsprites.ORIENTATIONS)),
}


class Vtab(ImageTask):
    """One VTAB dataset, or a stand-in, under the VTAB-1K protocol.

    Args:
        dataset: a name of DATASETS or ALIASES.
        test_size: ``default`` (all the test images of a file, 2000 of a rendered set), ``full`` (VTAB's test set), or a
            number, drawn.
        unreadable: ``error``, or ``skip`` to leave out and count images that cannot be decoded.
        hub: a dataset repository on the hub in the parquet layout, asked where ``paths.data`` has no folder.
        **common: of ImageTask.

    Raises:
        ConfigError: for an unknown dataset or setting.
    """

    def __init__(
        self,
        *,
        dataset: str,
        test_size: str | int = "default",
        unreadable: str = "error",
        hub: str | None = None,
        **common: Any,
    ):
        super().__init__(dataset=canonical_name(dataset), **common)
        if test_size not in ("default", "full") and not (isinstance(test_size, int) and test_size > 0):
            raise ConfigError(f"task.test_size={test_size} must be default, full or a number above 0")
        if unreadable not in ("error", "skip"):
            raise ConfigError(f"task.unreadable={unreadable} must be error or skip")
        self.test_size = test_size
        self.unreadable = unreadable
        self.hub = hub

    @property
    def entry(self) -> Entry:
        """The dataset's row of DATASETS."""
        return DATASETS[self.dataset]

    @property
    def safe_augmentation(self) -> str:
        """By the dataset's labels."""
        return self.entry.augment

    def load(self, *, image_size: int, data_dir: Path | None, interpolation: str = "bicubic") -> Splits:
        """See Task.load; from ``data_dir/DATASET/*.parquet``, else a download, or rendered."""
        if self.dataset in RENDERED and self._folder(data_dir) is None:
            return self._render(image_size, interpolation)
        pools, class_names, facts = self._open(data_dir)
        rows, rule, warnings = self.choose(pools)
        splits: dict[str, Any] = {}
        skipped: list[str] = []
        for split, chosen in rows.items():
            splits[split], missed = decode(
                pools.get(split, pools["train"]),
                chosen,
                image_size=image_size,
                interpolation=interpolation,
                unreadable=self.unreadable,
                resize=self.resize,
            )
            skipped += missed
        facts |= {
            "counts": {split: len(images) for split, images in splits.items()},
            "split_rule": rule,
            "unreadable": {"policy": self.unreadable, "skipped": len(skipped), "first": skipped[:10]},
            "warnings": warnings,
            "stands_for": self.entry.stands_for,
        }
        return Splits(**splits, num_classes=self.entry.classes, class_names=class_names, facts=facts)

    def _render(self, image_size: int, interpolation: str) -> Splits:
        label_rule, levels = RENDERED[self.dataset]
        sizes = {"default": RENDERED_TEST_SIZE, "full": dsprites.VTAB_TEST_SIZE}
        test_size = sizes.get(str(self.test_size), self.test_size)
        if int(test_size) > dsprites.VTAB_TEST_SIZE:
            raise ConfigError(
                f"task.test_size={test_size} is above VTAB's {dsprites.VTAB_TEST_SIZE} for {self.dataset}"
            )
        # Train and validation come first, so that they do not depend on the size of the test set.
        order = draw(dsprites.COMBINATIONS, self.split_seed)
        train, validation, rest = np.split(order, [TRAIN_SIZE, TRAIN_SIZE + VALIDATION_SIZE])
        splits: dict[str, Any] = {}
        digests = {}
        for split, chosen in {"train": train, "validation": validation, "test": rest[: int(test_size)]}.items():
            factors = dsprites.factors_of(chosen)
            images, labels = dsprites.render(factors), label_rule(factors)
            digests[split] = dsprites.fingerprint(images, labels)
            splits[split] = from_grey(images, labels, image_size, interpolation)
        facts = {
            "source": "re-rendered",
            "sha256": digests,
            "counts": {split: len(images) for split, images in splits.items()},
            "split_rule": f"draw without overlap from all {dsprites.COMBINATIONS} combinations, seed {self.split_seed}",
        }
        levels_of = [
            np.flatnonzero(dsprites.CLASSES * np.arange(levels) // levels == c) for c in range(dsprites.CLASSES)
        ]
        factor = self.dataset.removeprefix("dsprites_")
        names = [f"{factor} {members[0]}-{members[-1]}" for members in levels_of]
        return Splits(**splits, num_classes=dsprites.CLASSES, class_names=names, facts=facts)

    def _open(self, data_dir: Path | None) -> tuple[dict[str, Pool], list[str], dict[str, Any]]:
        """Pools train and, where the source has them, validation and test; class names; facts on the source."""
        folder = self._folder(data_dir)
        if folder is not None:
            return open_folder(folder, self.entry)
        reason = self._no_folder(data_dir)
        try:
            if self.hub is not None:
                return open_folder(from_hub(self.hub), self.entry, f"hub {self.hub}")
            if self.dataset not in SOURCES:
                raise DataError("no server offers it to a program: name a copy on the hub with task.hub=OWNER/NAME")
            return download(self.dataset, self.split_seed)
        except DataError as error:
            raise DataError(f"{reason}, and {error}; {available(data_dir)}") from error

    def _folder(self, data_dir: Path | None) -> Path | None:
        """The dataset's folder, under its own name or the one that official lists come with."""
        names = [self.dataset, *([self.entry.folder] if self.entry.folder else [])]
        places = [] if data_dir is None else [Path(data_dir) / name for name in names]
        return next((place for place in places if place.is_dir()), None)

    def _no_folder(self, data_dir: Path | None) -> str:
        if data_dir is None:
            return f"{self.dataset} needs files: set paths.data to a folder that holds {self.dataset}/train*.parquet"
        if not Path(data_dir).is_dir():
            return (
                f"data folder {data_dir} does not exist: set paths.data to one that holds {self.dataset}/train*.parquet"
            )
        return f"{data_dir} has no folder {self.dataset} with train*.parquet and test*.parquet"

    def choose(self, pools: dict[str, Pool]) -> tuple[dict[str, np.ndarray], str, list[str]]:
        """The rows of each split within its pool (train's if it has none), the rule in words, and warnings."""
        order = draw(len(pools["train"]), self.split_seed)
        rules = []
        if "test" in pools:
            test = np.arange(len(pools["test"]))
        else:
            kept = len(order) - round(HELD_OUT * len(order))
            order, test = order[:kept], order[kept:]
            rules.append(f"test a drawn {HELD_OUT:.0%} of the images")
        if "validation" in pools:
            validation = draw(len(pools["validation"]), self.split_seed)[:VALIDATION_SIZE]
            train = order[:TRAIN_SIZE]
            if len(train) < len(order):
                rules.append(f"train drawn from {len(order)}")
            if len(validation) < len(pools["validation"]):
                rules.append(f"validation drawn from {len(pools['validation'])}")
        else:
            chosen = order[: TRAIN_SIZE + VALIDATION_SIZE]
            train, validation = np.split(chosen, [len(chosen) - len(chosen) // 5])
            rules.append(f"train and validation drawn from {len(order)}")
        if self.test_size not in ("default", "full"):
            if int(self.test_size) > len(test):
                raise ConfigError(f"task.test_size={self.test_size}, but {self.dataset} has {len(test)} test images")
            rules.append(f"test drawn from {len(test)}")
            test = test[draw(len(test), self.split_seed)[: int(self.test_size)]]
        rows = {"train": train, "validation": validation, "test": test}
        warnings = [
            f"{split} has {len(rows[split])} images, VTAB-1K has {size}"
            for split, size in {"train": TRAIN_SIZE, "validation": VALIDATION_SIZE}.items()
            if len(rows[split]) != size
        ]
        rule = f"seeded draw, seed {self.split_seed}: {', '.join(rules)}" if rules else "as in the files"
        return rows, rule, warnings


def canonical_name(dataset: str) -> str:
    """VTAB's name of a dataset; ConfigError with the nearest names if there is none."""
    check_dataset(dataset, DATASETS, ALIASES)
    return ALIASES.get(dataset, dataset)


def available(data_dir: Path | None) -> str:
    """What can be used without a network, in words, for an error message."""
    found = []
    if data_dir is not None:
        found = [name for name in DATASETS if parquet.has_splits(Path(data_dir) / name)]
    folders = f"; in {data_dir}: {', '.join(found)}" if found else ""
    return f"available offline without a file: {', '.join(RENDERED)}{folders}"


def open_folder(
    folder: Path, entry: Entry, source: str = "paths.data"
) -> tuple[dict[str, Pool], list[str], dict[str, Any]]:
    """Pools, class names and facts of a folder of parquet files or official lists.

    Raises:
        DataError: for files that are missing, have changed or do not fit.
    """
    if lists.is_one(folder):
        return lists.open_folder(folder, entry)
    paths = {split: sorted(folder.rglob(f"{split}*.parquet")) for split in ("train", "validation", "test")}
    for split in ("train", "test"):
        if not paths[split]:
            raise DataError(f"{folder}: no {split}*.parquet; add it, or remove the folder to have it downloaded")
    everything = [path for members in paths.values() for path in members]
    manifest.check(folder, everything)
    names = (
        parquet.read_class_names(everything, entry.classes)
        if entry.column == "label"
        else [str(entry.first + c) for c in range(entry.classes)]
    )
    pools: dict[str, Pool] = {}
    files: dict[str, Any] = {}
    for split, members in paths.items():
        if members:
            pools[split], facts = parquet.open_pool(members, names, entry.column, entry.first)
            files |= facts
    return pools, names, {"source": source, "files": files}
