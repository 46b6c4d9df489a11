"""What the tasks of finding objects in images share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from flora.errors import ConfigError
from flora.models.detection import DetectionModel
from flora.models.spec import ModelSpec
from flora.tasks.base import Batch, Splits, Task, check_split_seed
from flora.tasks.detect.files import lost
from flora.tasks.detect.objects import Annotated
from flora.tasks.detect.sheet import draw_sheet
from flora.tasks.images.whole import WholeImages
from flora.tasks.portions import say


class ObjectTask(Task[DetectionModel]):
    """A task whose network gives ``losses`` and, in evaluation, ``detections``.

    Args:
        name, dataset, epochs: see Task.
        flip: probability of a training image to be mirrored.
        held_out: share of train that is validation, where the files have none beside the test.
        split_seed: of its draw.
        unreadable: ``error``, or ``skip`` to leave out and count images that cannot be decoded or are not there.

    Attributes:
        outline: how many numbers tell the outline of a detection: 4 or 8.

    Raises:
        ConfigError: for a value out of range.
    """

    metric = "mAP"
    leaves_files: ClassVar[bool] = True
    pictures: ClassVar[tuple[str, ...]] = ("detections.png",)
    outline: ClassVar[int] = 4

    def __init__(
        self, name: str, dataset: str, epochs: float, flip: float, held_out: float, split_seed: int, unreadable: str
    ) -> None:
        if unreadable not in ("error", "skip"):
            raise ConfigError(f"task.unreadable={unreadable} must be error or skip")
        if not isinstance(epochs, int | float) or epochs < 1:
            raise ConfigError(f"task.epochs={epochs} must be at least 1")
        for key, value in (("flip", flip), ("held_out", held_out)):
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigError(f"task.{key}={value} must lie in [0, 1]")
        check_split_seed(split_seed)
        self.name, self.dataset, self.epochs = name, dataset, epochs
        self.flip, self.held_out, self.split_seed, self.unreadable = flip, held_out, split_seed, unreadable
        self._annotated: Annotated | None = None
        self._rows: dict[str, np.ndarray] = {}

    def _keep(self, annotated: Annotated, rows: dict[str, np.ndarray]) -> None:
        """Remember what has been read: the images, and the rows of each split."""
        self._annotated, self._rows = annotated, rows

    @property
    def annotated(self) -> Annotated:
        """The images of all splits; ConfigError before they are read."""
        if self._annotated is None:
            raise ConfigError(f"task={self.name} scores against annotations: read them first, with load_for")
        return self._annotated

    def accepts(self, model: ModelSpec) -> None:
        """See Task.accepts."""
        if model.kind != "detection":
            raise ConfigError(f"model={model.name} does not detect: choose an image model for task={self.name}")

    def loss(self, outputs: dict[str, Tensor], targets: Tensor, label_smoothing: float) -> Tensor:
        """The sum of the detector's losses, each a mean over the batch."""
        if label_smoothing:
            raise ConfigError(f"trainer.label_smoothing={label_smoothing} is for classification: leave it 0")
        return outputs["losses"].sum()

    def condensed(self, outputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """See Task.condensed: detections, and the numbers of their images."""
        return outputs["detections"], labels

    def unlabelled(self, model: DetectionModel, inputs: Sequence[Any]) -> WholeImages:
        """Images, see ``flora.tasks.images.decode.as_picture``; decoded batch by batch."""
        return WholeImages.of(inputs, np.asarray, self.unreadable == "skip")

    @abstractmethod
    def entered(self, model: DetectionModel, batch: Batch) -> list[Tensor]:
        """What the network takes of an unlabelled batch: floats in [0, 1], ``[3, H, W]`` each."""

    def report(self, metric: Any, splits: Splits, folder: Path) -> None:
        """Write ``detections.png``, some test images with what was found; say which images were not readable."""
        skipped = self.annotated.skipped()
        of = {split: lost(self.annotated, rows) for split, rows in self._rows.items()}
        splits.facts["unreadable"] |= {"skipped": len(skipped), "first": skipped[:10], "of": of}
        if skipped:
            say(f"{self.dataset}: {len(skipped)} images cannot be decoded and were left out ({', '.join(skipped[:3])})")
        about = f"{self.dataset} images; " if splits.facts["source"] == self.dataset else ""
        draw_sheet(self.annotated, metric.found, metric.images, folder / "detections.png", self.outline, about)
