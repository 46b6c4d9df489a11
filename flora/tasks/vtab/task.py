"""VTAB-1K: 19 image datasets, 800 images to train, 200 to choose on, the whole test set once.

Zhai et al. 2019, "A Large-scale Study of Representation Learning with the Visual Task Adaptation Benchmark", arXiv
1910.04867. Dataset names, class counts and the label rules follow it; the draws of 800 and 200 are ours unless the
files hold the official ones.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flora import shared
from flora.errors import ConfigError, DataError
from flora.models.weights import check_repository
from flora.tasks.base import Splits, draw
from flora.tasks.images.decode import Pool, decode
from flora.tasks.images.task import ImageTask
from flora.tasks.portions import say
from flora.tasks.vtab import lists
from flora.tasks.vtab.datasets import DATASETS, TRAIN_SIZE, VALIDATION_SIZE, DatasetInfo, canonical_name
from flora.tasks.vtab.download import SOURCES, download, from_hub
from flora.tasks.vtab.files import available, open_folder, tables
from flora.tasks.vtab.rendered import RENDERED, load_rendered

HELD_OUT = 20  # percent of train, rounded down as VTAB does, where a source has no test set


class Vtab(ImageTask):
    """One VTAB dataset, or a stand-in, under the VTAB-1K protocol.

    Args:
        dataset: a name of DATASETS or ALIASES.
        augment: as of ImageTask; by default none, as images are only resized in VTAB-1K.
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
        augment: str = "none",
        test_size: str | int = "default",
        unreadable: str = "error",
        hub: str | None = None,
        **common: Any,
    ):
        super().__init__(dataset=canonical_name(dataset), augment=augment, **common)
        if test_size not in ("default", "full") and not (isinstance(test_size, int) and test_size > 0):
            raise ConfigError(f"task.test_size={test_size} must be default, full or a number above 0")
        if unreadable not in ("error", "skip"):
            raise ConfigError(f"task.unreadable={unreadable} must be error or skip")
        check_repository("task.hub", hub)
        self.test_size = test_size
        self.unreadable = unreadable
        self.hub = hub

    @property
    def info(self) -> DatasetInfo:
        """The dataset's row of DATASETS."""
        return DATASETS[self.dataset]

    @property
    def safe_augmentation(self) -> str:
        """By the dataset's labels."""
        return self.info.augment

    def load(self, *, image_size: int, data_dir: Path | None, interpolation: str = "bicubic") -> Splits:
        """See ImageTask.load; from ``data_dir/DATASET/*.parquet``, else a download, or rendered."""
        if self.dataset in RENDERED and self._folder(data_dir) is None:
            return load_rendered(self.dataset, self.test_size, self.split_seed, image_size, interpolation)
        opened = self._named(data_dir) if shared.on() else None
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
                orientation=self.orientation,
                content=partial(self._content, data_dir, split if split in pools else "train", opened),
            )
            skipped += missed
        if skipped:
            say(f"{self.dataset}: {len(skipped)} images cannot be decoded and were left out ({', '.join(skipped[:3])})")
        facts |= {
            "counts": {split: len(images) for split, images in splits.items()},
            "split_rule": rule,
            "orientation": self.orientation,
            "unreadable": {"policy": self.unreadable, "skipped": len(skipped), "first": skipped[:10]},
            "warnings": warnings,
            "stands_for": self.info.stands_for,
        }
        return Splits(**splits, num_classes=self.info.classes, class_names=class_names, facts=facts)

    def files(self, data_dir: Path | None) -> tuple[Path, list[Path]] | None:
        """The parquet files of a folder or of the hub; None where the data are rendered or torchvision's."""
        folder = self._folder(data_dir)
        if folder is None and (self.hub is None or self.dataset in RENDERED):
            return None
        place = folder or self._from_hub(data_dir)
        return place, [path for paths in tables(place).values() for path in paths]

    def contents(self, data_dir: Path | None) -> dict[str, str]:
        """See Task.contents; what torchvision downloads has its own checksums, and counts by where it is from."""
        folder = self._folder(data_dir)
        if folder is not None and lists.in_folder(folder):
            return lists.contents(folder)
        if folder is None and self.hub is None and self.dataset not in RENDERED:
            return {"source": self._open(data_dir)[2]["source"]}
        return super().contents(data_dir)

    def _content(self, data_dir: Path | None, pool: str, opened: str | None) -> str | None:
        """Names what a pool holds; None where that is no more what the files held before they were ``opened``."""
        return None if opened is None or self._named(data_dir) != opened else json.dumps([pool, opened])

    def _named(self, data_dir: Path | None) -> str | None:
        """Names what the files hold; None where they do not say: what torchvision downloads counts by its source."""
        if self._folder(data_dir) is None and self.hub is None:
            return None
        return json.dumps([self.dataset, sorted(self.contents(data_dir).items())])

    def _open(self, data_dir: Path | None) -> tuple[dict[str, Pool], list[str], dict[str, Any]]:
        """Pools train and, where the source has them, validation and test; class names; facts on the source."""
        folder = self._folder(data_dir)
        if folder is not None:
            return open_folder(folder, self.info)
        if self.hub is not None:
            return open_folder(self._from_hub(data_dir), self.info, f"hub {self.hub}")
        try:
            if self.dataset not in SOURCES:
                raise DataError("no server offers it to a program: name a copy on the hub with task.hub=OWNER/NAME")
            return download(self.dataset, self.split_seed)
        except DataError as error:
            raise self._nowhere(data_dir, error) from error

    def _from_hub(self, data_dir: Path | None) -> Path:
        try:
            return from_hub(str(self.hub))
        except DataError as error:
            raise self._nowhere(data_dir, error) from error

    def _nowhere(self, data_dir: Path | None, error: DataError) -> DataError:
        return DataError(f"{self._no_folder(data_dir)}, and {error}; {available(data_dir)}")

    def _folder(self, data_dir: Path | None) -> Path | None:
        """The dataset's folder, under its own name or the one that official lists come with."""
        names = [self.dataset, *([self.info.folder] if self.info.folder else [])]
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
            kept = len(order) - HELD_OUT * len(order) // 100
            order, test = order[:kept], order[kept:]
            rules.append(f"test a drawn {HELD_OUT}% of the images")
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
