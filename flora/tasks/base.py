"""What every task gives the trainer: three splits, a forward pass, a loss and a metric."""

from __future__ import annotations

import difflib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from flora.errors import ConfigError
from flora.tasks.augment import Augment
from flora.tasks.metrics import Classification

NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
AUGMENTATIONS = ("none", "crop", "flip", "crop_flip")
COUNTS = "counts"  # in a batch of an evaluation: False where it is only there because a batch cannot be empty

Batch = dict[str, Tensor]
Forward = Callable[[nn.Module, Batch, bool], Tensor]


class ImageDataset(Dataset[dict[str, Tensor]]):
    """Decoded images in memory; a batch is gathered with one indexing call.

    Args:
        images: uint8 ``[N, 3, H, W]``. Grey images may be an expanded ``[N, 1, H, W]``: it takes a third of the memory.
        labels: int64 ``[N]``, class indices.

    Raises:
        ValueError: on another dtype or shape.
    """

    def __init__(self, images: Tensor, labels: Tensor):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 [N, 3, H, W], not {images.dtype} {list(images.shape)}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be int64 [{len(images)}], not {labels.dtype} {list(labels.shape)}")
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One example: ``pixel_values`` uint8 ``[3, H, W]`` and ``labels`` int64 ``[]``."""
        return {"pixel_values": self.images[index], "labels": self.labels[index]}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A whole batch: ``pixel_values`` uint8 ``[B, 3, H, W]`` and ``labels`` int64 ``[B]``.

        The DataLoader hands it to ``collate_fn``, which is then the identity.
        """
        chosen = torch.as_tensor(indices)
        if self.images.is_cuda:  # a copy from pinned memory does not wait for the GPU
            chosen = chosen.pin_memory().to(self.images.device, non_blocking=True)
        return {"pixel_values": self.images.index_select(0, chosen), "labels": self.labels[chosen]}

    @property
    def nbytes(self) -> int:
        """Bytes of the images and labels."""
        return self._bands().nbytes + self.labels.nbytes

    def to(self, device: torch.device | str) -> ImageDataset:
        """The same examples on a device, where their batches are then gathered."""
        return ImageDataset(self._bands().to(device).expand_as(self.images), self.labels.to(device))

    def _bands(self) -> Tensor:
        """The channels that memory holds: one of grey images, else all."""
        return self.images[:, :1] if self.images.stride(1) == 0 else self.images

    def concat(self, other: ImageDataset) -> ImageDataset:
        """Both after each other, copied; unlike torch's ConcatDataset the result still gathers a batch in one call."""
        return ImageDataset(torch.cat([self.images, other.images]), torch.cat([self.labels, other.labels]))

    def subset(self, count: int, seed: int = 0) -> ImageDataset:
        """``count`` examples in their old order, drawn with ``seed``: stored splits are often sorted by class."""
        if count >= len(self):
            return self
        chosen = torch.from_numpy(np.sort(draw(len(self), seed)[:count]))
        return ImageDataset(self.images.index_select(0, chosen), self.labels[chosen])


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Of logits ``[N, C]`` and classes ``[N]`` or their probabilities ``[N, C]``, in fp32 whatever the autocast."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)


def draw(count: int, seed: int) -> np.ndarray:
    """A random order of ``range(count)``, int64 ``[count]``, the same on every machine.

    RandomState and not Generator: only its stream is promised never to change (NumPy's NEP 19).
    """
    return np.random.RandomState(seed).permutation(count)


@dataclass(frozen=True)
class Splits:
    """A loaded task.

    Each split is a dataset in memory like ``ImageDataset``: it gathers whole batches, with the targets under
    ``labels``, and has ``concat`` and ``subset``. Text has ``lengths`` as well, by which batches are formed.
    ``train`` fits the adapter, ``validation`` chooses settings and epochs, ``test`` is evaluated once; it may be
    ``validation`` itself, where that is what was published. ``num_classes`` counts outputs, 1 for a regression.
    ``facts`` is JSON-able and goes into the record: ``source``, ``counts`` per split, ``split_rule``, ``sha256`` of the
    files or of the rendered content, ``unreadable`` images skipped, ``warnings``. ``further_tests`` are evaluated as
    well, their metrics under ``NAME_METRIC``.
    """

    train: Any
    validation: Any
    test: Any
    num_classes: int
    class_names: list[str]
    facts: dict[str, Any]
    further_tests: dict[str, Any] = field(default_factory=dict)


class Task(ABC):
    """A dataset with its protocol, built by Hydra from ``configs/task``.

    Attributes:
        name: of the family, ``vtab``.
        dataset: within the family, ``eurosat``.
        metric: the key of ``metrics().compute(...)`` that selects and is reported.
        epochs: default length of training.
    """

    name: str
    dataset: str
    metric: str
    epochs: float

    @abstractmethod
    def load_for(self, model: Any, data_dir: Path | None) -> Splits:
        """Read, check and split the data as the model takes it.

        Args:
            model: the model spec (``flora.models``), for its image size or its tokenizer.
            data_dir: the folder ``paths.data``, or None for tasks that need no file.

        Raises:
            ConfigError: for a setting that cannot be used, or a model of another kind.
            DataError: for data that is missing, unreadable or inconsistent.
        """

    @abstractmethod
    def forward(self, model: Any) -> Forward:
        """The forward pass ``(module, batch, training) -> outputs`` of a model spec; the batch is on the device.

        It may replace the batch's ``labels``, which the loss reads afterwards.
        """

    def loss(self, outputs: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        """The training loss; by default of a classifier."""
        return cross_entropy(outputs, labels, label_smoothing)

    @abstractmethod
    def metrics(self) -> evaluate.Metric:
        """The metric, ready to ``compute``, with ``greater_is_better``; it needs no network."""

    def report(self, metric: Any, splits: Splits, folder: Path) -> None:
        """What else to leave in the run's folder, or in ``splits.facts``, after the test; by default nothing.

        Args:
            metric: that has just scored the test split.
            splits: of the run.
            folder: the run's.
        """
        return None


def stand_in(index: int, count: int, can_be_read: Callable[[int], bool]) -> list[int]:
    """The next of ``count`` examples that can be read, for a batch that would be empty without it.

    Images may be skipped, and a batch may be of one. A hundred are tried, then the list is empty.
    """
    tried = (following % count for following in range(index + 1, index + 101))
    return list(itertools.islice(filter(can_be_read, tried), 1))


def check_dataset(dataset: str, known: Collection[str], aliases: Collection[str] = ()) -> None:
    """ConfigError with the nearest names for a dataset that a family does not know."""
    if dataset in known or dataset in aliases:
        return
    close = difflib.get_close_matches(str(dataset), [*known, *aliases])
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ConfigError(f"task.dataset={dataset} is unknown; {hint}choose one of {', '.join(known)}")


def check_split_seed(split_seed: int) -> None:
    """ConfigError for a seed that ``draw`` cannot take."""
    if not isinstance(split_seed, int) or not 0 <= split_seed < 2**32:
        raise ConfigError(f"task.split_seed={split_seed} must be a whole number in 0..{2**32 - 1}")


class ImageTask(Task):
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

    Raises:
        ConfigError: for an unknown augmentation or preprocessing, epochs below 1, or a seed out of range.
    """

    metric = "accuracy"

    def __init__(
        self,
        *,
        name: str,
        dataset: str,
        epochs: int,
        augment: str = "auto",
        split_seed: int = 0,
        normalisation: str | None = None,
        resize: str | None = None,
        interpolation: str | None = None,
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
        ):
            if value is not None and value not in allowed:
                raise ConfigError(f"task.{key}={value} is unknown; choose null (the default) or {', '.join(allowed)}")
        self._augment = augment
        self.normalisation = normalisation
        self.resize = resize or "squash"
        self.interpolation = interpolation

    @abstractmethod
    def load(self, *, image_size: int, data_dir: Path | None, interpolation: str = "bicubic") -> Splits:
        """``load_for`` by its parts.

        Args:
            image_size: side in pixels; the whole image is resized to a square, as VTAB does.
            data_dir: the folder ``paths.data``, or None for tasks that need no file.
            interpolation: ``nearest``, ``bilinear`` or ``bicubic``.
        """

    def load_for(self, model: Any, data_dir: Path | None) -> Splits:
        """See Task.load_for."""
        if hasattr(model, "kind"):  # of transformers
            raise ConfigError(
                f"model={model.name} does not classify images: choose an image model for task={self.name}"
            )
        interpolation = self.interpolation or model.interpolation
        return self.load(image_size=model.image_size, data_dir=data_dir, interpolation=interpolation)

    def forward(self, model: Any) -> Forward:
        """Augment (training only) and normalise uint8 batches on their device, then classify."""
        augment = self.augment()

        def forward(module: nn.Module, batch: Batch, training: bool) -> Tensor:
            images = batch["pixel_values"]
            if training and augment is not None:
                images = augment(images)
            return module(self.normalised(model, images))

        return forward

    def normalised(self, model: Any, images: Tensor) -> Tensor:
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
