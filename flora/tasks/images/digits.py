"""scikit-learn's handwritten digits: 1797 images that come with the library, a smoke test of seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from flora.errors import ConfigError
from flora.tasks.base import Splits
from flora.tasks.images.decode import from_grey
from flora.tasks.images.task import ImageTask


class Digits(ImageTask):
    """The 8 x 8 digits of the UCI set "Optical Recognition of Handwritten Digits" (CC BY 4.0), scaled up.

    60 % train, 20 % validation, 20 % test, stratified by class. Arguments are those of ImageTask.

    Raises:
        ConfigError: for another dataset than ``digits``.
    """

    safe_augmentation = "none"

    def __init__(self, *, dataset: str, **common: Any):
        super().__init__(dataset=dataset, **common)
        if dataset != "digits":
            raise ConfigError(f"task.dataset={dataset}: task=digits has only digits; task=vtab has the others")

    def files(self, data_dir: Path | None) -> None:
        """None: they come with the library."""

    def load(self, *, image_size: int, data_dir: Path | None = None, interpolation: str = "bicubic") -> Splits:
        """See ImageTask.load; no file is read."""
        data = load_digits()
        grey = np.round(data.images * (255 / 16)).astype(np.uint8)
        rest, test = train_test_split(
            np.arange(len(grey)), test_size=0.2, random_state=self.split_seed, stratify=data.target
        )
        train, validation = train_test_split(
            rest, test_size=0.25, random_state=self.split_seed, stratify=data.target[rest]
        )
        rows = {"train": train, "validation": validation, "test": test}
        facts = {
            "source": "sklearn.datasets.load_digits",
            "counts": {split: len(chosen) for split, chosen in rows.items()},
            "split_rule": f"stratified draw, seed {self.split_seed}",
        }
        splits: dict[str, Any] = {
            split: from_grey(grey[chosen], data.target[chosen], image_size, interpolation)
            for split, chosen in rows.items()
        }
        return Splits(**splits, num_classes=10, class_names=[str(digit) for digit in range(10)], facts=facts)
