"""The datasets of VTAB-1K that need no file: dSprites, re-rendered."""

from __future__ import annotations

from typing import Any

import numpy as np

from flora.errors import ConfigError
from flora.tasks.base import Splits, draw
from flora.tasks.images.decode import from_grey
from flora.tasks.vtab import dsprites
from flora.tasks.vtab.datasets import TRAIN_SIZE, VALIDATION_SIZE

TEST_SIZE = 2000
# The rule that makes labels of factors, and the levels of the factor that it looks at.
RENDERED = {
    "dsprites_location": (dsprites.location_labels, dsprites.POSITIONS),
    "dsprites_orientation": (dsprites.orientation_labels, len(dsprites.ORIENTATIONS)),
}


def load_rendered(dataset: str, test_size: str | int, split_seed: int, image_size: int, interpolation: str) -> Splits:
    """The splits of a re-rendered dataset.

    Args:
        dataset: a key of RENDERED.
        test_size: ``default`` (2000), ``full`` (VTAB's test set), or a number, drawn.
        split_seed: of the draw of the splits.
        image_size: side in pixels.
        interpolation: how images are resized.

    Raises:
        ConfigError: more test images than VTAB has.
    """
    label_rule, levels = RENDERED[dataset]
    sizes = {"default": TEST_SIZE, "full": dsprites.VTAB_TEST_SIZE}
    test_count = int(sizes.get(str(test_size), test_size))
    if test_count > dsprites.VTAB_TEST_SIZE:
        raise ConfigError(f"task.test_size={test_count} is above VTAB's {dsprites.VTAB_TEST_SIZE} for {dataset}")
    # Train and validation come first, so that they do not depend on the size of the test set.
    order = draw(dsprites.COMBINATIONS, split_seed)
    train, validation, rest = np.split(order, [TRAIN_SIZE, TRAIN_SIZE + VALIDATION_SIZE])
    splits: dict[str, Any] = {}
    digests = {}
    for split, chosen in {"train": train, "validation": validation, "test": rest[:test_count]}.items():
        factors = dsprites.factors_of(chosen)
        images, labels = dsprites.render(factors), label_rule(factors)
        digests[split] = dsprites.fingerprint(images, labels)
        splits[split] = from_grey(images, labels, image_size, interpolation)
    facts = {
        "source": "re-rendered",
        "sha256": digests,
        "counts": {split: len(images) for split, images in splits.items()},
        "split_rule": f"draw without overlap from all {dsprites.COMBINATIONS} combinations, seed {split_seed}",
    }
    levels_of = [np.flatnonzero(dsprites.CLASSES * np.arange(levels) // levels == c) for c in range(dsprites.CLASSES)]
    factor = dataset.removeprefix("dsprites_")
    names = [f"{factor} {members[0]}-{members[-1]}" for members in levels_of]
    return Splits(**splits, num_classes=dsprites.CLASSES, class_names=names, facts=facts)
