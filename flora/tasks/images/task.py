"""Image classification: what all image tasks share."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn

from flora import contents
from flora.errors import ConfigError
from flora.models.spec import ImageSpec, ModelSpec
from flora.tasks.base import Batch, Forward, Splits, Task, check_split_seed
from flora.tasks.images.augment import Augment
from flora.tasks.images.decode import ORIENTATIONS
from flora.tasks.metrics import Classification

NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
AUGMENTATIONS = ("none", "crop", "flip", "crop_flip")


class ImageTask(Task[ImageSpec]):
    """Image classification: accuracy, and crop and flip where the labels survive them.

    Args:
        name: of the family, as records show it.
        dataset: within the family.
        epochs: default length of training.
        augment: ``auto`` (the dataset's own rule) or one of AUGMENTATIONS.
        split_seed: of the draw of the splits; apart from the training seed, so that seeds share their data.
        normalisation: ``imagenet``, ``half`` (mean and deviation 1/2), ``none`` (pixels in [0, 1]); None: the model's.
        resize: ``squash`` to a square, or ``crop``; None: squash, as VTAB does.
        interpolation: ``nearest``, ``bilinear`` or ``bicubic``; None: the model's.
        orientation: ``exif`` turns images as their files ask, ``stored`` takes the pixels as they lie; None: exif.

    Raises:
        ConfigError: for an unknown augmentation or preprocessing, epochs below 1, or a seed out of range.
    """

    metric = "accuracy"

    def __init__(
        self,
        *,
        name: str,
        dataset: str,
        epochs: float,
        augment: str = "auto",
        split_seed: int = 0,
        normalisation: str | None = None,
        resize: str | None = None,
        interpolation: str | None = None,
        orientation: str | None = None,
    ):
        if augment not in ("auto", *AUGMENTATIONS):
            raise ConfigError(f"task.augment={augment} is unknown; choose one of auto, {', '.join(AUGMENTATIONS)}")
        if not isinstance(epochs, int | float) or epochs < 1:
            raise ConfigError(f"task.epochs={epochs} must be at least 1")
        check_split_seed(split_seed)
        self.name = name
        self.dataset = dataset
        self.epochs = epochs
        self.split_seed = split_seed
        for key, value, allowed in (
            ("normalisation", normalisation, tuple(NORMALISATIONS)),
            ("resize", resize, ("squash", "crop")),
            ("interpolation", interpolation, ("nearest", "bilinear", "bicubic")),
            ("orientation", orientation, ORIENTATIONS),
        ):
            if value is not None and value not in allowed:
                raise ConfigError(f"task.{key}={value} is unknown; choose null (the default) or {', '.join(allowed)}")
        self._augment = augment
        self.normalisation = normalisation
        self.resize = resize or "squash"
        self.interpolation = interpolation
        self.orientation = orientation or "exif"

    @abstractmethod
    def load(self, *, image_size: int, data_dir: Path | None, interpolation: str = "bicubic") -> Splits:
        """``read`` by its parts.

        Args:
            image_size: side in pixels; the whole image is resized to a square, as VTAB does.
            data_dir: the folder ``paths.data``, or None for tasks that need no file.
            interpolation: ``nearest``, ``bilinear`` or ``bicubic``.
        """

    def accepts(self, model: ModelSpec) -> None:
        """See Task.accepts."""
        if model.kind != "image":
            raise ConfigError(
                f"model={model.name} does not classify images: choose an image model for task={self.name}"
            )

    def contents(self, data_dir: Path | None) -> dict[str, str]:
        """See Task.contents; also of all images beside the files, which may name them."""
        found = self.files(data_dir)
        return {} if found is None else contents.of(*found)

    def read(self, model: ImageSpec, data_dir: Path | None) -> Splits:
        """See Task.read."""
        interpolation = self.interpolation or model.interpolation
        return self.load(image_size=model.image_size, data_dir=data_dir, interpolation=interpolation)

    def forward(self, model: ImageSpec) -> Forward:
        """Augment (training only) and normalise uint8 batches on their device, then classify."""
        augment = self.augment()

        def forward(module: nn.Module, batch: Batch, training: bool) -> tuple[Tensor, Tensor]:
            images = batch["pixel_values"]
            if training and augment is not None:
                images = augment(images)
            return module(self.normalised(model, images)), batch["labels"]

        return forward

    def normalised(self, model: ImageSpec, images: Tensor) -> Tensor:
        """Uint8 images as the model takes them, or as ``normalisation`` says."""
        if self.normalisation is None:
            return model.normalize(images)
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in NORMALISATIONS[self.normalisation])
        return images.float().div_(255).sub_(mean).div_(std)

    @property
    @abstractmethod
    def safe_augmentation(self) -> str:
        """What ``augment=auto`` means here: the strongest of AUGMENTATIONS that keeps the labels true."""

    def augment(self) -> nn.Module | None:
        """Random crop with padding, and flip where allowed, on uint8 batches ``[B, 3, H, W]``; None if neither is."""
        policy = self.safe_augmentation if self._augment == "auto" else self._augment
        return None if policy == "none" else Augment(crop="crop" in policy, flip="flip" in policy)

    def metrics(self) -> Classification:
        """Accuracy and mean per-class accuracy."""
        return Classification()
