"""Semantic segmentation: UPerNet over a pretrained network, scored by mIoU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from flora import contents
from flora.errors import ConfigError, DataError
from flora.models.segmentation import UperNet
from flora.models.spec import ModelSpec
from flora.tasks.base import Batch, Forward, Predicted, Splits, Task, check_dataset, check_split_seed, draw
from flora.tasks.images.whole import WholeImages
from flora.tasks.metrics import Regions
from flora.tasks.portions import AS_FILES, say
from flora.tasks.segment import maps
from flora.tasks.segment.areas import areas
from flora.tasks.segment.crops import distorted, random_crop, whole
from flora.tasks.segment.dataset import Catalogue, LazyScenes
from flora.tasks.segment.datasets import DATASETS, IGNORED
from flora.tasks.segment.files import found, masks, scenes
from flora.tasks.segment.sheet import draw_sheet
from flora.tasks.segment.windows import check_windows, slid

AUXILIARY_WEIGHT = 0.4  # of the auxiliary head's loss, as published
_LEAST = 32  # pixels a side: the last map would be empty
_DRAWN, _SIDE = 8, 320  # images of the contact sheet, and their longer side


class Segment(Task[UperNet]):
    """A class for each pixel of ``paths.data/DATASET``: tables of image and annotation, or ADE20K's official folder.

    In training an image and its mask are scaled, cropped and flipped together; an evaluation sees whole images, or
    windows that slide over them, and predicts at the size of their masks.

    Args:
        name: of the family, as records show it.
        dataset: ``camvid`` or ``ade20k``.
        epochs: default length of training.
        size: short side of images in pixels, at scale 1; None: the data set's.
        crop: side of a training crop in pixels; None: the data set's.
        scales: least and greatest random factor of the size in training.
        flip: flip half of the training crops.
        photometric: change brightness, contrast, saturation and hue of training crops at random; None: leave them.
        hidden_size: channels of the decoder; None: the data set's.
        window: an evaluation slides windows of this side in pixels over an image; None: it sees it whole.
        stride: from one window to the next; None: two thirds of the window.
        held_out: share of train that is validation where the files have no test, as ADE20K's validation is the test.
        split_seed: of that draw.
        unreadable: ``error``, or ``skip`` to leave out and count images and masks that cannot be decoded.

    Raises:
        ConfigError: an unknown data set, or values out of range.
    """

    metric = "mIoU"
    pictures: ClassVar[tuple[str, ...]] = ("predictions.png",)
    leaves_files: ClassVar[bool] = True

    def __init__(
        self,
        *,
        name: str,
        dataset: str,
        epochs: float,
        size: int | None = None,
        crop: int | None = None,
        scales: Sequence[float] = (0.5, 2.0),
        flip: bool = True,
        photometric: bool | None = None,
        hidden_size: int | None = None,
        window: int | None = None,
        stride: int | None = None,
        held_out: float = 0.02,
        split_seed: int = 0,
        unreadable: str = "error",
    ) -> None:
        check_dataset(dataset, DATASETS)
        check_split_seed(split_seed)
        if unreadable not in ("error", "skip"):
            raise ConfigError(f"task.unreadable={unreadable} must be error or skip")
        if not isinstance(epochs, int | float) or epochs < 1:
            raise ConfigError(f"task.epochs={epochs} must be at least 1")
        if not 0 < held_out < 1:
            raise ConfigError(f"task.held_out={held_out} must lie between 0 and 1")
        for key, switch in (("flip", flip), ("photometric", photometric)):
            if not isinstance(switch, bool | None):
                raise ConfigError(f"task.{key}={switch} must be true or false")
        self.name, self.dataset, self.epochs, self.flip = name, dataset, epochs, flip
        self.photometric = bool(photometric)
        self.held_out, self.split_seed, self.unreadable = held_out, split_seed, unreadable
        self.data = DATASETS[dataset]
        self.size, self.crop = size or self.data.size, crop or self.data.crop
        self.hidden_size = hidden_size or self.data.hidden_size
        check_windows(window, stride, _LEAST)
        self.window = window
        self.stride = stride or (2 * window // 3 if window else None)
        for key, value in (("size", self.size), ("crop", self.crop)):
            if type(value) is not int or value < _LEAST:
                raise ConfigError(f"task.{key}={value} must be a whole number of at least {_LEAST} pixels")
        numbers = isinstance(scales, list | tuple) and all(isinstance(scale, int | float) for scale in scales)
        if not numbers or len(scales) != 2 or not 0.05 <= scales[0] <= scales[1] <= 20:
            raise ConfigError(f"task.scales={scales} must be two factors between 0.05 and 20, the least first")
        self.scales = float(scales[0]), float(scales[1])
        self._turns: dict[int, int] = {}  # of the test's rows: which are shown first, as neighbours look alike
        self._called: dict[int, np.ndarray] = {}  # what was said of some of them

    def network(self, model: ModelSpec) -> ModelSpec:
        """See Task.network: UPerNet over a network of timm."""
        return UperNet(model, self.hidden_size)

    def accepts(self, model: ModelSpec) -> None:
        """See Task.accepts."""
        if not isinstance(model, UperNet):
            raise ConfigError(f"task={self.name} trains UPerNet over a network of timm: build it by Task.network")

    def files(self, data_dir: Path | None) -> tuple[Path, list[Path]]:
        """See Task.files: the tables, or ADE20K's images."""
        folder = self._folder(data_dir)
        return folder, [path for members in found(folder).values() for path in members]

    def contents(self, data_dir: Path | None) -> dict[str, str]:
        """Of tables each, of a folder of images and masks all together."""
        folder, files = self.files(data_dir)
        if files[0].suffix == ".parquet":
            return contents.of(folder, files)
        return {"images": contents.checksum(files, folder), "masks": contents.checksum(masks(folder), folder)}

    def _folder(self, data_dir: Path | None) -> Path:
        folder = Path(data_dir or ".") / self.dataset
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}: set paths.data to the folder above {self.dataset}")
        return folder

    def read(self, model: UperNet, data_dir: Path | None) -> Splits:
        """See Task.read; nothing is decoded yet."""
        folder = self._folder(data_dir)
        there = scenes(folder)
        starts = np.cumsum([0, *map(len, there.values())])
        rows = {split: np.arange(*place) for split, place in zip(there, pairwise(starts), strict=True)}
        rows, rule = self._split(folder, rows)
        every = [scene for members in there.values() for scene in members]
        noted = torch.zeros(len(every), dtype=torch.bool).share_memory_()
        catalogue = Catalogue(every, self.data, self.unreadable == "skip", noted)
        fill = tuple(round(255 * mean) for mean in model.mean)

        def plain(
            image: Image.Image, labels: np.ndarray, random: np.random.RandomState | None
        ) -> tuple[np.ndarray, np.ndarray]:
            return np.asarray(whole(image, self.size, model.interpolation)), labels

        def cropped(
            image: Image.Image, labels: np.ndarray, random: np.random.RandomState | None
        ) -> tuple[np.ndarray, np.ndarray]:
            assert random is not None
            options: dict[str, Any] = {"size": self.size, "crop": self.crop, "scales": self.scales, "flip": self.flip}
            pixels, target = random_crop(image, labels, random, interpolation=model.interpolation, fill=fill, **options)
            return distorted(pixels, random) if self.photometric else pixels, target

        turns = draw(len(rows["test"]), 0)
        self._turns, self._called = dict(zip(rows["test"].tolist(), turns.tolist(), strict=True)), {}
        facts = {
            "source": "paths.data",
            "sha256": self.contents(data_dir),
            "counts": {split: len(part) for split, part in rows.items()},
            "split_rule": rule,
            "unreadable": {"policy": self.unreadable},
            "warnings": [],
        }
        return Splits(
            train=LazyScenes(catalogue, rows["train"], cropped, draws=True),
            validation=LazyScenes(catalogue, rows["validation"], plain, draws=False),
            test=LazyScenes(catalogue, rows["test"], plain, draws=False),
            num_classes=len(self.data.classes),
            class_names=list(self.data.classes),
            facts=facts,
        )

    def _split(self, folder: Path, rows: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], str]:
        """The rows of all three splits from those that the files have, and how that was done."""
        if len(rows) == 3:
            return rows, AS_FILES
        if "validation" not in rows:
            raise DataError(f"{folder} has no validation beside {' and '.join(rows)}: fetch the data set again")
        order = draw(len(rows["train"]), self.split_seed)
        count = round(self.held_out * len(order))
        if not 0 < count < len(order):
            raise DataError(f"{folder}: task.held_out={self.held_out} of {len(order)} images leaves a split empty")
        parts = {"train": np.sort(order[count:]), "validation": np.sort(order[:count]), "test": rows["validation"]}
        rule = f"test is the files' validation, validation a drawn {self.held_out:.0%} of train, seed {self.split_seed}"
        return parts, rule

    def forward(self, model: UperNet) -> Forward:
        """See Task.forward: logits of both heads in training, else those of whole images at the size of their masks."""

        def forward(module: nn.Module, batch: Batch, training: bool) -> tuple[Any, Tensor]:
            images, labels = model.normalize(batch["pixel_values"]), batch["labels"].long()
            if training:
                return module(images), labels
            logits = _logits(self._seeing(module), images, batch["sizes"].tolist(), labels.shape[-2:])
            self._note(logits, batch)
            return logits, labels

        return forward

    def _seeing(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """How an evaluation looks at images ``[B, 3, H, W]``: whole, or by windows."""
        if self.window is None or self.stride is None:
            return module
        return partial(slid, module, window=self.window, stride=self.stride)

    def loss(self, outputs: Any, targets: Tensor, label_smoothing: float) -> Tensor:
        """The mean over the pixels that count; the auxiliary head's counts 0.4."""
        if isinstance(outputs, Tensor):
            return _over_pixels(outputs, targets, label_smoothing)
        main, auxiliary = (_over_pixels(logits, targets, label_smoothing) for logits in outputs)
        return main + AUXILIARY_WEIGHT * auxiliary

    def condensed(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See Task.condensed: the areas of the classes ``[B, 3, C]``, and how many pixels count ``[B]``."""
        return areas(outputs, labels), (labels != IGNORED).flatten(1).sum(dim=1)

    def metrics(self) -> Regions:
        """mIoU, mean accuracy and pixel accuracy, and the IoU of each class."""
        return Regions(self.data.classes)

    def unlabelled(self, model: UperNet, inputs: Sequence[Any]) -> WholeImages:
        """Images, see ``flora.tasks.images.decode.as_picture``; decoded batch by batch."""

        def entered(image: Image.Image) -> np.ndarray:
            return np.asarray(whole(image, self.size, model.interpolation))

        return WholeImages.of(inputs, entered, self.unreadable == "skip")

    def predicting(self, model: UperNet) -> Forward:
        """See Task.predicting: of each image a row of ``flora.tasks.segment.maps.maps``."""

        def forward(module: nn.Module, batch: Batch, training: bool) -> tuple[Tensor, Tensor]:
            images = model.normalize(batch["pixel_values"])
            return maps.maps(self._seeing(module), images, batch["sizes"].tolist()), batch["labels"]

        return forward

    def understood(self, row: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
        """``classes``, int16 ``[H, W]``: a class for each pixel of the image, as it is stored."""
        classes = maps.of_row(row)
        if (classes == maps.NOTHING).any():
            raise ConfigError("the network's outputs are not finite: set trainer.dtype=fp32")
        return {"classes": classes}

    def leave(self, predicted: Iterable[Predicted], class_names: Sequence[str], folder: Path) -> None:
        """A map and an overlay of each image, shares of the classes, the classes' colours."""
        maps.write(predicted, class_names, folder)

    def preprocessing(self, model: UperNet) -> dict[str, Any]:
        """See Task.preprocessing."""
        said = super().preprocessing(model) | {"short_side": self.size, "orientation": "stored"}
        if self.window is not None:
            said |= {"window": self.window, "stride": self.stride}
        return {name: value for name, value in said.items() if name != "image_size"}

    def report(self, metric: Any, splits: Splits, folder: Path) -> None:
        """Write ``predictions.png``, some test images with truth and prediction; say what was not readable."""
        assert isinstance(splits.test, LazyScenes)
        catalogue = splits.test.catalogue
        skipped = catalogue.skipped()
        splits.facts["unreadable"] |= {"skipped": len(skipped), "first": skipped[:10]}
        if skipped:
            say(f"{self.dataset}: {len(skipped)} images cannot be decoded and were left out ({', '.join(skipped[:3])})")
        shown = []
        for row, called in sorted(self._called.items()):
            if (read := catalogue.read(row)) is not None:
                image, labels = read
                height, width = called.shape
                near = np.ix_(*(np.arange(n) * side // n for n, side in zip(called.shape, labels.shape, strict=True)))
                shown.append((np.asarray(image.resize((width, height))), labels[near], called))
        draw_sheet(shown, splits.class_names, folder / "predictions.png")

    def _note(self, logits: Tensor, batch: Batch) -> None:
        """Keep, small, what was said of some images of the test."""
        for index, row in enumerate(batch["rows"].tolist()):
            turns = [self._turns[other] for other in self._called]
            if row not in self._turns or (len(turns) >= _DRAWN and self._turns[row] > max(turns)):
                continue
            height, width = batch["sizes"][index, 2:].tolist()
            step = max(1, max(height, width) // _SIDE)
            self._called[row] = logits[index, :, :height:step, :width:step].argmax(dim=0).cpu().numpy()
            if len(turns) == _DRAWN:
                del self._called[max(self._called, key=self._turns.__getitem__)]


def _logits(
    module: Callable[[Tensor], Tensor], images: Tensor, sizes: Sequence[Sequence[int]], side: Sequence[int]
) -> Tensor:
    """Logits ``[B, C, *side]`` of images that were filled up, each as if it were alone: what was filled up is cut off.

    Images of one size go through the network together.
    """
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, size in enumerate(sizes):
        rows_of.setdefault(tuple(size), []).append(row)
    filled: Tensor | None = None
    for (height, width, *label), rows in rows_of.items():
        logits = module(images[rows, :, :height, :width])
        logits = F.interpolate(logits.float(), size=tuple(label), mode="bilinear", align_corners=False)
        if len(rows_of) == 1 and tuple(label) == tuple(side):
            return logits
        if filled is None:
            filled = logits.new_zeros(len(images), logits.shape[1], *side)
        filled[rows, :, : label[0], : label[1]] = logits
    assert filled is not None
    return filled


def _over_pixels(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy at the size of the targets; 0 where no pixel counts."""
    logits = logits.float()
    if logits.shape[-2:] != targets.shape[-2:]:
        logits = F.interpolate(logits, size=targets.shape[-2:], mode="bilinear", align_corners=False)
    # Summed apart: torch's own sum over pixels is not deterministic on a GPU.
    each = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none", label_smoothing=label_smoothing)
    return each.sum() / (targets != IGNORED).sum().clamp(min=1)
