"""The handwritten digits: every image once, the same shares of each class in every split."""

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from flora.errors import ConfigError
from flora.tasks import Digits

COMMON = {"name": "digits", "epochs": 3}


def test_every_digit_is_in_one_split_with_its_label():
    splits = Digits(dataset="digits", **COMMON).load(image_size=8, data_dir=None)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [1077, 360, 360]
    both = splits.train.concat(splits.validation).concat(splits.test)
    shown = sorted(
        (image[0].tobytes(), int(label)) for image, label in zip(both.images.numpy(), both.labels, strict=True)
    )
    source = load_digits()
    grey = np.round(source.images / 16 * 255).astype(np.uint8)
    assert shown == sorted((image.tobytes(), int(label)) for image, label in zip(grey, source.target, strict=True))


def test_classes_are_spread_evenly_and_the_split_seed_decides():
    first, again, other = (
        Digits(dataset="digits", split_seed=seed, **COMMON).load(image_size=8, data_dir=None) for seed in (0, 0, 1)
    )
    for split, share in [(first.train, 0.6), (first.validation, 0.2), (first.test, 0.2)]:
        shares = np.bincount(split.labels) / np.bincount(load_digits().target)
        assert shares == pytest.approx(np.full(10, share), abs=0.01)
    assert np.array_equal(first.test.images, again.test.images)
    assert not np.array_equal(first.test.images, other.test.images)


def test_images_are_scaled_up_as_pillow_does():
    small, large = (
        Digits(dataset="digits", **COMMON).load(image_size=size, data_dir=None).train.images for size in (8, 32)
    )
    expected = Image.fromarray(small[5, 0].numpy()).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(large[5, 1].numpy(), np.asarray(expected))


def test_there_is_one_dataset():
    with pytest.raises(ConfigError, match="only digits"):
        Digits(dataset="mnist", **COMMON)
