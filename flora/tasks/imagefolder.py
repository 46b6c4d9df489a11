"""Any folder of labelled images: class folders or parquet, decoded batch by batch, augmented as timm does."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torch.utils.data import Dataset

from flora.errors import ConfigError, DataError
from flora.tasks import manifest, parquet
from flora.tasks.base import COUNTS, Batch, Forward, ImageTask, Splits, draw, stand_in
from flora.tasks.images import as_rgb
from flora.tasks.metrics import TopFive
from flora.tasks.mix import erase, mix

_IMAGES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_NAMES = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
_NAMED_CLASSES, _LETTERS = 40, 30  # more do not fit beside a picture


@dataclass(frozen=True)
class Catalogue:
    """All images of a folder.

    Attributes:
        openers: one function an image, that opens it.
        labels: class indices ``[N]``.
        names: what messages call the images.
        unreadable: bool ``[N]``, which turned out so; in memory that worker processes share.
    """

    openers: Sequence[Callable[[], Image.Image]]
    labels: np.ndarray
    names: Sequence[str]
    unreadable: Tensor

    def skipped(self) -> list[str]:
        """Names of the images that could not be decoded, sorted."""
        return sorted(self.names[row] for row in self.unreadable.nonzero().flatten().tolist())


class LazyImages(Dataset[Batch]):
    """Images that are opened when a batch asks for them.

    Args:
        catalogue: where they are.
        rows: which of them, int64 ``[N]``.
        transform: from an RGB image to uint8 ``[3, H, W]``.
        draws: whether the transform is random. It then depends on the seed, the epoch and the image alone: not on
            threads, worker processes, the order of images or where a run was resumed.
        skip: leave out images that cannot be decoded; otherwise they are an error.
        once: whether each image counts once, as in an evaluation, so that one which stands in does not.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        rows: np.ndarray,
        transform: Callable[[Image.Image], np.ndarray],
        draws: bool = False,
        skip: bool = False,
        once: bool = False,
    ):
        self.catalogue, self.rows, self.transform, self.draws, self.skip = catalogue, rows, transform, draws, skip
        self.once = once
        self.moment = (0, 0)

    @property
    def labels(self) -> np.ndarray:
        """Class indices ``[N]``."""
        return self.catalogue.labels[self.rows]

    @property
    def unreadable(self) -> Tensor:
        """Of all images of the catalogue, which were met and could not be decoded."""
        return self.catalogue.unreadable

    def begin_epoch(self, seed: int, epoch: int) -> None:
        """Say what the random numbers of a transform depend on, beside the image."""
        self.moment = (seed, epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        """One example."""
        return {name: value[0] for name, value in self.__getitems__([index]).items() if name != COUNTS}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """``pixel_values`` uint8 ``[B, 3, H, W]`` and ``labels`` int64 ``[B]``, without images that are skipped.

        Where all are skipped, the next image that can be decoded stands in.
        """
        rows = self.rows[list(indices)]
        with _generators_kept() if self.draws else contextlib.nullcontext():
            found = list(_threads(os.getpid()).map(self._decode, rows))
        kept = [(pixels, row) for pixels, row in zip(found, rows, strict=True) if pixels is not None]
        if not kept:
            instead = stand_in(indices[-1], len(self), lambda index: self._decode(self.rows[index]) is not None)
            if instead:
                return self.__getitems__(instead) | ({COUNTS: torch.tensor(False)} if self.once else {})
            name = self.catalogue.names[rows[0]]
            raise DataError(f"{name}, {len(rows) - 1} more of its batch and those after it: none can be decoded")
        pixels, whole = zip(*kept, strict=True)
        return {
            "pixel_values": torch.from_numpy(np.stack(pixels)),
            "labels": torch.from_numpy(self.catalogue.labels[list(whole)]),
        }

    def concat(self, other: LazyImages) -> LazyImages:
        """Both after each other, under this one's transform; of one catalogue."""
        assert other.catalogue is self.catalogue
        return self._with(np.concatenate([self.rows, other.rows]))

    def subset(self, count: int, seed: int = 0) -> LazyImages:
        """``count`` examples in their old order, drawn with ``seed``."""
        return self if count >= len(self) else self._with(self.rows[np.sort(draw(len(self), seed)[:count])])

    def _with(self, rows: np.ndarray) -> LazyImages:
        return LazyImages(self.catalogue, rows, self.transform, self.draws, self.skip, self.once)

    def _decode(self, row: int) -> np.ndarray | None:
        try:
            rgb = as_rgb(self.catalogue.openers[row], self.catalogue.names[row])
        except DataError:
            if not self.skip:
                raise
            self.catalogue.unreadable[row] = True
            return None
        if not self.draws:
            return np.asarray(self.transform(rgb))
        with _one_at_a_time:
            _seed_generators(*self.moment, int(row))
            return np.asarray(self.transform(rgb))


# Transforms of timm and torchvision draw from the generators of the whole process; trainer.num_workers adds processes.
_one_at_a_time = threading.Lock()


def _seed_generators(*words: int) -> None:
    seed = int(np.random.SeedSequence(words).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """Inside, the generators of the process may be seeded; afterwards they are as before."""
    python, numpy, own = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(own)


class ImageFolder(ImageTask):
    """Image classification on ``paths.data/DATASET``: ``train``, ``val`` and ``test`` as class folders or parquet.

    Without a test set the validation set is the test, and a part of train is held out to choose on.

    Args:
        dataset: the folder's name; ``.``: ``paths.data`` itself.
        classes: how many there must be; None: as many as there are.
        held_out: share of train that is validation where none is left beside the test.
        unreadable: ``error``, or ``skip`` to leave out and count images that cannot be decoded.
        auto_augment: timm's name of a policy, ``rand-m9-mstd0.5-inc1``; None: random resized crops and flips alone.
        color_jitter: strength, where ``auto_augment`` is None; None: none.
        crop_scale: least share of an image that a training crop covers.
        random_erasing: probability of an image to lose a rectangle.
        mixup, cutmix: see ``flora.tasks.mix``.
        crop_pct: share of an image that evaluation looks at.
        **common: of ImageTask; ``augment=none`` trains on whole images as evaluation sees them.

    Raises:
        ConfigError: for a value out of range.
    """

    safe_augmentation = "flip"

    def __init__(
        self,
        *,
        dataset: str,
        classes: int | None = None,
        held_out: float = 0.1,
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
        for key, value, low, high in (
            *(("held_out", held_out, 0, 1), ("random_erasing", random_erasing, 0, 1), ("crop_pct", crop_pct, 0.1, 1)),
            *(("mixup", mixup, 0, 100), ("cutmix", cutmix, 0, 100), ("crop_scale", crop_scale, 0.001, 1)),
        ):
            if not low <= value <= high:
                raise ConfigError(f"task.{key}={value} must lie in [{low}, {high}]")
        self.classes, self.held_out, self.unreadable = classes, held_out, unreadable
        self.auto_augment, self.color_jitter, self.crop_scale = auto_augment, color_jitter, crop_scale
        self.random_erasing, self.mixup, self.cutmix, self.crop_pct = random_erasing, mixup, cutmix, crop_pct
        self._num_classes = 0

    def augment(self) -> None:
        """Nothing on batches: training images are cropped and changed one by one."""
        return None

    def metrics(self) -> TopFive:
        """Accuracy among the first and the first five guesses, and mean per-class accuracy."""
        return TopFive()

    def load(self, *, image_size: int, data_dir: Path | None, interpolation: str = "bicubic") -> Splits:
        """See Task.load; nothing is decoded yet."""
        folder = Path(data_dir or ".") / self.dataset
        catalogue, found, names, facts = self._open(folder)
        draws, skip = self._augment != "none", self.unreadable == "skip"
        whole = self._transform(image_size, interpolation, False)
        plain = partial(LazyImages, catalogue, transform=whole, skip=skip, once=True)
        train, test = found["train"], found["test" if "test" in found else "validation"]
        if "test" in found and "validation" in found:
            validation = found["validation"]
            rule = "as in the files"
        else:
            order = draw(len(train), self.split_seed)
            count = round(self.held_out * len(order))
            if not 0 < count < len(order):
                raise DataError(f"{folder}: task.held_out={self.held_out} of {len(order)} images leaves a split empty")
            train, validation = train[order[count:]], train[np.sort(order[:count])]
            rule = f"validation a drawn {self.held_out:.0%} of train, seed {self.split_seed}"
        self._num_classes = len(names)
        changed = self._transform(image_size, interpolation, draws)
        splits: dict[str, Any] = {
            "train": LazyImages(catalogue, train, changed, draws, skip),
            "validation": plain(validation),
            "test": plain(test),
        }
        facts |= {
            "counts": {split: len(part) for split, part in splits.items()},
            "split_rule": rule,
            "unreadable": {"policy": self.unreadable},
            "warnings": [],
        }
        return Splits(**splits, num_classes=len(names), class_names=names, facts=facts)

    def forward(self, model: Any) -> Forward:
        """Normalise; in training mix and erase as well, and the labels with the images."""
        plain = super().forward(model)

        def forward(module: nn.Module, batch: Batch, training: bool) -> Tensor:
            if not training or not (self.mixup or self.cutmix or self.random_erasing):
                return plain(module, batch, training)
            images = self.normalised(model, batch["pixel_values"])
            if self.random_erasing:
                images = erase(images, self.random_erasing)
            images, batch["labels"] = mix(images, batch["labels"], self._num_classes, self.mixup, self.cutmix)
            return module(images)

        return forward

    def report(self, metric: Any, splits: Splits, folder: Path) -> None:
        """Write ``confusion.png``, how the test images of each class were called; say which were not readable."""
        skipped = splits.test.catalogue.skipped()
        splits.facts["unreadable"] |= {"skipped": len(skipped), "first": skipped[:10]}
        draw_confusion(metric.confusion, splits.class_names, folder / "confusion.png")

    def _transform(self, size: int, interpolation: str, training: bool) -> Callable[[Image.Image], np.ndarray]:
        options: dict[str, Any] = {"is_training": training, "use_prefetcher": True, "interpolation": interpolation}
        if training:
            options |= {"scale": (self.crop_scale, 1.0), "auto_augment": self.auto_augment}
            options |= {"color_jitter": self.color_jitter, "hflip": 0.0 if self._augment == "crop" else 0.5}
        else:
            options |= {"crop_pct": self.crop_pct}
        return create_transform(size, **options)

    def _open(self, folder: Path) -> tuple[Catalogue, dict[str, np.ndarray], list[str], dict[str, Any]]:
        """All images, the rows of each split, the names of the classes, and facts of the files."""
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}: set paths.data, and task.dataset to a folder in it")
        files = {
            split: sorted({path for name in names for path in folder.rglob(f"{name}*.parquet")})
            for split, names in _NAMES.items()
        }
        read = partial(_parquet, folder, files) if files["train"] else partial(_tree, folder)
        found, names, facts = read(self.classes)
        if "train" not in found or len(found) == 1:
            raise DataError(f"{folder} needs train and val or test, as folders of classes or parquet files")
        if self.classes is not None and len(names) != self.classes:
            raise DataError(f"{folder} has {len(names)} classes, task.classes={self.classes}")
        if len(names) < 2:
            raise DataError(f"{folder} has one class, {names[0]}: there is nothing to tell apart")
        openers, labels, called = (list(chain(*parts)) for parts in zip(*found.values(), strict=True))
        unreadable = torch.zeros(len(labels), dtype=torch.bool).share_memory_()
        catalogue = Catalogue(openers, np.array(labels, np.int64), called, unreadable)
        starts = np.cumsum([0, *(len(members) for members, _, _ in found.values())])
        rows = {split: np.arange(*place) for split, place in zip(found, pairwise(starts), strict=True)}
        return catalogue, rows, names, {"source": "paths.data"} | facts


Parts = tuple[list[Callable[[], Image.Image]], np.ndarray, list[str]]


def _tree(folder: Path, classes: int | None) -> tuple[dict[str, Parts], list[str], dict[str, Any]]:
    """Splits that are folders of class folders."""
    places = {split: place for split, names in _NAMES.items() for name in names if (place := folder / name).is_dir()}
    classes_of = {
        split: sorted(p.name for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))
        for split, place in places.items()
    }
    names = classes_of.get("train", [])
    found = {}
    for split, place in places.items():
        if unknown := sorted(set(classes_of[split]) - set(names)):
            raise DataError(f"{place}: class {unknown[0]} is not in train; check that both are of the same dataset")
        files = [(file, label) for label, name in enumerate(names) for file in _images(place / name)]
        if not files:
            raise DataError(f"{place} holds no folders with images ({', '.join(_IMAGES)})")
        openers: list[Callable[[], Image.Image]] = [partial(Image.open, file) for file, _ in files]
        found[split] = openers, np.array([label for _, label in files], np.int64), [str(file) for file, _ in files]
    return found, names, {}


def _images(folder: Path) -> list[Path]:
    files = folder.rglob("*") if folder.is_dir() else ()
    return sorted(file for file in files if file.suffix.lower() in _IMAGES and file.is_file())


def _parquet(
    folder: Path, files: dict[str, list[Path]], classes: int | None
) -> tuple[dict[str, Parts], list[str], dict[str, Any]]:
    """Splits that are parquet files; their encoded images stay in memory."""
    everything = [path for members in files.values() for path in members]
    manifest.check(folder, everything)
    names = parquet.read_class_names(everything, classes)
    found: dict[str, Parts] = {}
    facts: dict[str, Any] = {}
    for split, members in files.items():
        if members:
            pool, described = parquet.open_pool(members, names)
            rows = np.arange(len(pool))
            found[split] = list(pool.open_rows(rows)), pool.labels, [pool.where(int(row)) for row in rows]
            facts |= described
    return found, names, {"files": facts}


def draw_confusion(counts: np.ndarray, names: Sequence[str], path: Path) -> None:
    """A picture of counts ``[true, called]``, each row as shares of its class."""
    from matplotlib.figure import Figure

    side = 4 + 0.2 * min(len(names), _NAMED_CLASSES)
    figure = Figure((side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= _NAMED_CLASSES:
        shown = [_short(name) for name in names]
        axes.set_xticks(range(len(names)), shown, rotation=90)
        axes.set_yticks(range(len(names)), shown)
    axes.set_xlabel("called")
    axes.set_ylabel("is")
    figure.colorbar(picture, label="share of the class")
    figure.savefig(path)


def _short(name: str) -> str:
    """A name for beside a picture, where dollars would be a formula."""
    return (name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…").replace("$", r"\$")


@cache
def _threads(process: int) -> ThreadPoolExecutor:
    # A process that is forked has its parent's pool, but not the pool's threads.
    return ThreadPoolExecutor(max_workers=min(32, os.cpu_count() or 1))
