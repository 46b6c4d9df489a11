"""Any folder of labelled images: class folders or parquet, decoded batch by batch, augmented as timm does."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from flora.errors import ConfigError, DataError, first_line
from flora.models.spec import ImageSpec
from flora.tasks import baselines
from flora.tasks.base import Batch, Forward, Splits, draw
from flora.tasks.imagefolder.confusion import draw_confusion
from flora.tasks.imagefolder.dataset import LazyImages
from flora.tasks.imagefolder.files import contents, open_folder, say_ignored, tables
from flora.tasks.imagefolder.mix import erase, mix
from flora.tasks.images.task import ImageTask
from flora.tasks.metrics import TopFive
from flora.tasks.portions import AS_FILES, SPLITS, UNDRAWN, WHOLE, absent, portions, rule_of, say, shares


class ImageFolder(ImageTask):
    """Image classification on ``paths.data/DATASET``: ``train``, ``val`` and ``test`` as class folders or parquet.

    Without a test set the validation set is the test, and a part of train is held out to choose on. Without both, as in
    a folder of classes alone, all three are drawn, class by class.

    Args:
        dataset: the folder's name; ``.``: ``paths.data`` itself.
        classes: how many there must be; None: as many as there are.
        held_out: share of train that is validation where none is left beside the test.
        split: parts of train, validation and test where the folder has no validation and no test; None: 70, 15, 15.
        class_order: of folders of classes: ``value`` puts whole numbers by their value (1, 2, 10); ``name``: all as
            texts (1, 10, 2), as runs were trained whose config says nothing of it.
        unreadable: ``error``, or ``skip`` to leave out and count images that cannot be decoded.
        auto_augment: timm's name of a policy, ``rand-m9-mstd0.5-inc1``; None: random resized crops and flips alone.
        color_jitter: strength, where ``auto_augment`` is None; None: none.
        crop_scale: least share of an image that a training crop covers.
        random_erasing: probability of an image to lose a rectangle.
        mixup, cutmix: see ``flora.tasks.imagefolder.mix``.
        crop_pct: share of an image that evaluation looks at.
        **common: of ImageTask; ``augment=none`` trains on whole images as evaluation sees them.

    Raises:
        ConfigError: for a value out of range.
    """

    safe_augmentation = "flip"

    pictures: ClassVar[tuple[str, ...]] = ("confusion.png",)

    def __init__(
        self,
        *,
        dataset: str,
        classes: int | None = None,
        held_out: float = 0.1,
        split: list[float] | None = None,
        class_order: str = "name",
        unreadable: str = "error",
        auto_augment: str | None = None,
        color_jitter: float | None = None,
        crop_scale: float = 0.08,
        random_erasing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        crop_pct: float = 0.875,
        **common: Any,
    ):
        super().__init__(dataset=dataset, **common)
        if unreadable not in ("error", "skip"):
            raise ConfigError(f"task.unreadable={unreadable} must be error or skip")
        if class_order not in ("value", "name"):
            raise ConfigError(f"task.class_order={class_order} must be value or name")
        for key, value, low, high in (
            *(("held_out", held_out, 0, 1), ("random_erasing", random_erasing, 0, 1), ("crop_pct", crop_pct, 0.1, 1)),
            *(("mixup", mixup, 0, 100), ("cutmix", cutmix, 0, 100), ("crop_scale", crop_scale, 0.001, 1)),
        ):
            if not low <= value <= high:
                raise ConfigError(f"task.{key}={value} must lie in [{low}, {high}]")
        self.classes, self.held_out, self.unreadable = classes, held_out, unreadable
        self.split, self.class_order = split, class_order
        self.parts = shares(split)
        self.auto_augment, self.color_jitter, self.crop_scale = auto_augment, color_jitter, crop_scale
        self.random_erasing, self.mixup, self.cutmix, self.crop_pct = random_erasing, mixup, cutmix, crop_pct
        self._num_classes = 0
        try:
            self._transform(8, "bicubic", True)
        except Exception as error:  # timm raises almost any type on a policy that is none
            raise ConfigError(
                f"task.auto_augment={auto_augment} with task.color_jitter={color_jitter} is no augmentation of timm "
                f"({first_line(error)}): choose e.g. rand-m9-mstd0.5-inc1"
            ) from error

    def augment(self) -> None:
        """Nothing on batches: training images are cropped and changed one by one."""
        return None

    def metrics(self) -> TopFive:
        """Accuracy among the first and the first five guesses, and mean per-class accuracy."""
        return TopFive()

    def files(self, data_dir: Path | None) -> tuple[Path, list[Path]]:
        """The parquet files, if there are any."""
        folder = self._folder(data_dir)
        return folder, [path for members in tables(folder).values() for path in members]

    def contents(self, data_dir: Path | None) -> dict[str, str]:
        """Also of folders of classes."""
        return contents(self._folder(data_dir))

    def _folder(self, data_dir: Path | None) -> Path:
        return Path(data_dir or ".") / self.dataset

    def load(self, *, image_size: int, data_dir: Path | None, interpolation: str = "bicubic") -> Splits:
        """See ImageTask.load; nothing is decoded yet."""
        folder = self._folder(data_dir)
        say_ignored(folder)
        catalogue, rows, names, facts = open_folder(folder, self.classes, self.orientation, self.class_order)
        if (trained := self.trained_classes) and set(names) <= set(trained):
            catalogue.labels[:] = np.array([trained.index(name) for name in names])[catalogue.labels]
            names = list(trained)
        draws, skip = self._augment != "none", self.unreadable == "skip"
        whole = self._transform(image_size, interpolation, False)
        plain = partial(LazyImages, catalogue, transform=whole, skip=skip, once=True)
        rows, rule = self._split(folder, catalogue.labels, rows)
        train, validation, test = (rows[split] for split in SPLITS)
        seen = ("test",) if rule == WHOLE else SPLITS  # the others are the same rows then
        warnings = absent({split: catalogue.labels[rows[split]] for split in seen}, names)
        for warning in warnings:
            say(f"{folder}: {warning}; its metrics are over the others")
        self._num_classes = len(names)
        changed = self._transform(image_size, interpolation, draws)
        splits: dict[str, Any] = {
            "train": LazyImages(catalogue, train, changed, draws, skip),
            "validation": plain(validation),
            "test": plain(test),
        }
        facts |= {
            "counts": {split: len(splits[split]) for split in seen},
            "split_rule": rule,
            "orientation": self.orientation,
            "unreadable": {"policy": self.unreadable},
            "warnings": warnings,
        }
        beside = [name.removeprefix(f"{folder}{os.sep}") for name in catalogue.names]
        drawn = {split: [beside[row] for row in part] for split, part in rows.items()} if rule not in UNDRAWN else {}
        return Splits(**splits, num_classes=len(names), class_names=names, facts=facts, drawn=drawn)

    def _split(
        self, folder: Path, labels: np.ndarray, rows: dict[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], str]:
        """The rows of all three splits from those that the files have, and how that was done."""
        if self.split is not None and len(rows) > 1:
            raise ConfigError(f"task.split={self.split}: {folder} has {' and '.join(rows)} already; leave it out")
        if len(rows) == len(SPLITS):
            return rows, AS_FILES
        if len(rows) == 1 and self.whole_test:
            return {split: np.sort(rows["train"]) for split in SPLITS}, WHOLE
        if len(rows) == 1:
            rule = rule_of(self.parts, self.split_seed, "class")
            drawn = portions(labels, self.parts, self.split_seed)
            if empty := [split for split, part in drawn.items() if not len(part)]:
                raise DataError(f"{folder}: no class has the three images that {empty[0]} needs: add some")
            say(f"{folder} has no validation and no test: {rule} ({', '.join(f'{len(drawn[s])} {s}' for s in SPLITS)})")
            return drawn, rule
        train, test = rows["train"], rows["test" if "test" in rows else "validation"]
        order = draw(len(train), self.split_seed)
        count = round(self.held_out * len(order))
        if not 0 < count < len(order):
            raise DataError(f"{folder}: task.held_out={self.held_out} of {len(order)} images leaves a split empty")
        parts = {"train": train[order[count:]], "validation": train[np.sort(order[:count])], "test": test}
        return parts, f"validation a drawn {self.held_out:.0%} of train, seed {self.split_seed}"

    def forward(self, model: ImageSpec) -> Forward:
        """Normalise; in training erase and mix as well: targets are then the share of each class, ``[B, C]``."""
        plain = super().forward(model)

        def forward(module: nn.Module, batch: Batch, training: bool) -> tuple[Tensor, Tensor]:
            if not training or not (self.mixup or self.cutmix or self.random_erasing):
                return plain(module, batch, training)
            images = self.normalised(model, batch["pixel_values"])
            if self.random_erasing:
                images = erase(images, self.random_erasing)
            images, shares = mix(images, batch["labels"], self._num_classes, self.mixup, self.cutmix)
            return module(images), shares

        return forward

    def evaluated_pixels(self, model: ImageSpec) -> Callable[[Image.Image], np.ndarray]:
        """See ImageTask.evaluated_pixels."""
        return self._transform(model.image_size, self.interpolation or model.interpolation, False)

    def preprocessing(self, model: ImageSpec) -> dict[str, Any]:
        """See Task.preprocessing."""
        return super().preprocessing(model) | {"resize": "crop", "crop_pct": self.crop_pct}

    def report(self, metric: Any, splits: Splits, folder: Path) -> None:
        """Write ``confusion.png``, how the test images of each class were called; say which were not readable."""
        assert isinstance(splits.test, LazyImages)
        skipped = splits.test.catalogue.skipped()
        assert isinstance(splits.train, LazyImages)
        lost = splits.test.catalogue.unreadable.numpy()
        of = {split: int(lost[getattr(splits, split).rows].sum()) for split in splits.facts["counts"]}
        splits.facts["unreadable"] |= {"skipped": len(skipped), "first": skipped[:10], "of": of}
        for split, names in splits.drawn.items():  # so that who reckons from the list finds what was used
            missing = lost[getattr(splits, split).rows]
            names[:] = [name for name, gone in zip(names, missing, strict=True) if not gone]
        if skipped:
            say(f"{self.dataset}: {len(skipped)} images cannot be decoded and were left out ({', '.join(skipped[:3])})")
        labels = splits.train.catalogue.labels[splits.train.rows[~lost[splits.train.rows]]]
        splits.facts["baseline"], lines = baselines.of_classes(
            labels, metric.confusion, splits.class_names, self.usual_class
        )
        for line in lines:
            say(f"{self.dataset}: {line}")
        draw_confusion(metric.confusion, splits.class_names, folder / "confusion.png")

    def _transform(self, size: int, interpolation: str, training: bool) -> Callable[[Image.Image], np.ndarray]:
        options: dict[str, Any] = {"is_training": training, "use_prefetcher": True, "interpolation": interpolation}
        if training:
            options |= {"scale": (self.crop_scale, 1.0), "auto_augment": self.auto_augment}
            options |= {"color_jitter": self.color_jitter, "hflip": 0.0 if self._augment == "crop" else 0.5}
        else:
            options |= {"crop_pct": self.crop_pct}
        return create_transform(size, **options)
