"""Object detection: Faster R-CNN or Mask R-CNN over a pretrained network, scored as COCO is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flora import contents
from flora.errors import DataError
from flora.models.detection import DetectionModel, Sizes
from flora.models.spec import ModelSpec
from flora.tasks.base import Batch, Forward, Predicted, Splits
from flora.tasks.detect import found
from flora.tasks.detect.base import ObjectTask
from flora.tasks.detect.dataset import AnnotatedImages
from flora.tasks.detect.files import open_folder, tables
from flora.tasks.detect.objects import check_polygons
from flora.tasks.detect.scores import CocoScores


class Detect(ObjectTask):
    """Object detection on ``paths.data/DATASET``: parquet files, or COCO's annotation files with folders of images.

    Args:
        name: of the family, as records show it.
        dataset: the folder's name.
        epochs: default length of training.
        masks: find masks as well, with Mask R-CNN; the annotations must have them.
        short_sides, longest_side, anchors, channels, hidden: see ``flora.models.detection.Sizes``.
        flip: probability of a training image to be mirrored.
        held_out: share of train that is validation, where the files have none beside the test.
        split_seed: of its draw.
        unreadable: ``error``, or ``skip`` to leave out and count images that cannot be decoded or are not there.

    Raises:
        ConfigError: for a value out of range.
    """

    def __init__(
        self,
        *,
        name: str,
        dataset: str,
        epochs: float,
        masks: bool = False,
        short_sides: Sequence[int] = (800,),
        longest_side: int = 1333,
        anchors: Sequence[int] = (32, 64, 128, 256, 512),
        channels: int = 256,
        hidden: int = 1024,
        flip: float = 0.5,
        held_out: float = 0.1,
        split_seed: int = 0,
        unreadable: str = "error",
    ) -> None:
        super().__init__(name, dataset, epochs, flip, held_out, split_seed, unreadable)
        self.masks = masks
        self.sizes = Sizes(tuple(short_sides), longest_side, tuple(anchors), channels, hidden)
        self._ids: list[int] | None = None  # what the annotation file calls the classes

    def network(self, model: ModelSpec) -> DetectionModel:
        """A detector over the model's feature maps."""
        return DetectionModel(model, self.sizes, self.masks)

    def files(self, data_dir: Path | None) -> tuple[Path, list[Path]]:
        """See Task.files."""
        folder = self._folder(data_dir)
        return folder, [path for paths in tables(folder).values() for path in paths]

    def contents(self, data_dir: Path | None) -> dict[str, str]:
        """See Task.contents; also of all images beside the files."""
        return contents.of(*self.files(data_dir))

    def _folder(self, data_dir: Path | None) -> Path:
        return Path(data_dir or ".") / self.dataset

    def read(self, model: DetectionModel, data_dir: Path | None) -> Splits:
        """See Task.read; nothing is decoded yet."""
        folder, skip = self._folder(data_dir), self.unreadable == "skip"
        annotated, rows, facts = open_folder(folder, self.held_out, self.split_seed, self.unreadable)
        if self.masks and annotated.objects.masks is None:
            raise DataError(f"{folder}: not all objects have a mask: set task.masks=false, which detects boxes alone")
        if self.masks:
            check_polygons(annotated)
        self._keep(annotated, rows)
        facts |= {
            "counts": {split: len(part) for split, part in rows.items()},
            "unreadable": {"policy": self.unreadable},
            "warnings": [],
        }
        splits: dict[str, Any] = {
            split: AnnotatedImages(annotated, part, self.masks, skip, once=split != "train")
            for split, part in rows.items()
        }
        names = annotated.class_names
        return Splits(**splits, num_classes=len(names), class_names=names, facts=facts)

    def forward(self, model: DetectionModel) -> Forward:
        """Mirror some images (training only), then losses and, in evaluation, detections: see ``Detector``."""

        def forward(module: nn.Module, batch: Batch, training: bool) -> tuple[dict[str, Tensor], Tensor]:
            sizes, counts = batch["sizes"].tolist(), batch["found"].tolist()
            mirrored = (torch.rand(len(sizes)) < self.flip).tolist() if training else [False] * len(sizes)
            images, targets = [], []
            of = (batch[name].split(counts) for name in ("boxes", "classes", *(["masks"] if self.masks else [])))
            for pixels, (height, width), mirror, objects in zip(
                batch["pixel_values"], sizes, mirrored, zip(*of, strict=True), strict=True
            ):
                image = pixels[:, :height, :width].float().div_(255)
                target = {"boxes": objects[0], "labels": objects[1] + 1}
                if self.masks:
                    target["masks"] = objects[2][:, :height, :width]
                if mirror:
                    image, target = _mirrored(image, target)
                images.append(image)
                targets.append(target)
            return module(images, targets), batch["labels"]

        return forward

    def metrics(self) -> CocoScores:
        """COCO's average precision over what was read."""
        return CocoScores(self.annotated)

    def remember(self, facts: Mapping[str, Any]) -> None:
        """Take what the annotation file calls the classes."""
        files = [said for said in (facts.get("files") or {}).values() if "category_ids" in said]
        self._ids = files[0]["category_ids"] if files else None

    def entered(self, model: DetectionModel, batch: Batch) -> list[Tensor]:
        """See ObjectTask.entered: whole images."""
        sizes = batch["sizes"].tolist()
        return [
            pixels[:, :height, :width].float().div_(255)
            for pixels, (height, width, *_) in zip(batch["pixel_values"], sizes, strict=True)
        ]

    def predicting(self, model: DetectionModel) -> Forward:
        """See Task.predicting: of each image ``[1 + D, F]``, its height and width, then what ``Detector`` finds."""

        def forward(module: nn.Module, batch: Batch, training: bool) -> tuple[Tensor, Tensor]:
            detections = module(self.entered(model, batch))["detections"]
            first = torch.zeros_like(detections[:, :1])
            first[:, 0, :2] = batch["sizes"][:, 2:]
            return torch.cat([first, detections], dim=1), batch["labels"]

        return forward

    def understood(self, row: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
        """``objects``: what was found, see ``flora.tasks.detect.found.Found``."""
        height, width = row[0, :2].astype(int).tolist()
        return {"objects": found.of_rows(row[1:], class_names, height, width)}

    def leave(self, predicted: Iterable[Predicted], class_names: Sequence[str], folder: Path) -> None:
        """COCO's results, and a picture of each image with boxes."""
        found.write(predicted, class_names, self._ids or range(len(class_names)), folder)

    def preprocessing(self, model: DetectionModel) -> dict[str, Any]:
        """See Task.preprocessing."""
        sides = {"short_side": self.sizes.short_sides[-1], "longest_side": self.sizes.longest_side}
        return sides | {"mean": model.mean, "std": model.std, "orientation": "stored"}


def _mirrored(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """An image ``[3, H, W]`` and its objects, left and right exchanged."""
    left, top, right, bottom = target["boxes"].unbind(1)
    width = image.shape[-1]
    target = target | {"boxes": torch.stack([width - right, top, width - left, bottom], dim=1)}
    if "masks" in target:
        target["masks"] = target["masks"].flip(-1)
    return image.flip(-1), target
