"""Images that splits share: equal ones, alike ones, and a hash held to transforms made by hand."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from flora.tasks.prepare import leaks


def scene(seed: int, size: int = 96) -> Image.Image:
    """Patches of several sizes over each other, the finer the fainter, as photographs have them."""
    draws = np.random.RandomState(seed)
    total = np.zeros((size, size, 3))
    for cells in (4, 8, 16, 32):
        noise = Image.fromarray(draws.randint(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += (np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC), float) - 128) * 2 / cells**0.5
    return Image.fromarray(np.clip(total + 110, 0, 230).astype(np.uint8))


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def distance(one: Image.Image, other: Image.Image) -> int:
    (bits,) = leaks.nearest(leaks.perceptual_hash(one)[None], leaks.perceptual_hash(other)[None])
    return bits


ALIKE = {
    "as JPEG": lambda image: as_jpeg(image, 40),
    "smaller": lambda image: image.resize((48, 48), Image.Resampling.BICUBIC),
    "larger": lambda image: image.resize((200, 200), Image.Resampling.BILINEAR),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "grey": lambda image: image.convert("L").convert("RGB"),
}
UNLIKE = {
    "flipped": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "turned": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "moved": lambda image: Image.fromarray(np.roll(np.asarray(image), 24, axis=1)),
}


@pytest.mark.parametrize("change", ALIKE)
def test_the_same_picture_stays_alike(change):
    assert max(distance(scene(seed), ALIKE[change](scene(seed))) for seed in range(8)) <= leaks.NEAR


@pytest.mark.parametrize("change", UNLIKE)
def test_another_picture_is_not_alike(change):
    assert min(distance(scene(seed), UNLIKE[change](scene(seed))) for seed in range(8)) > 2 * leaks.NEAR


def test_different_scenes_differ_in_about_half_of_the_bits():
    found = [distance(scene(seed), scene(seed + 100)) for seed in range(20)]
    assert min(found) > leaks.BITS / 4
    assert abs(np.mean(found) - leaks.BITS / 2) < leaks.BITS / 10


def test_equal_and_alike_images_are_counted_for_each_pair_of_splits():
    train = [scene(seed) for seed in range(6)]
    validation = [scene(0), as_jpeg(scene(1), 60), scene(20)]
    test = [scene(2), scene(2), as_jpeg(scene(3), 60), scene(20), scene(30)]

    def broken():
        raise OSError("no image")

    splits = {"train": train, "validation": validation, "test": test}
    openers = {split: [image.copy for image in images] for split, images in splits.items()}
    openers["test"].append(broken)
    assert leaks.count(openers) == {
        "train, validation": {"exact": 1, "near": 1},
        "train, test": {"exact": 2, "near": 1},
        "validation, test": {"exact": 1, "near": 0},
    }
    assert leaks.count({"train": [], "test": openers["test"]}) == {"train, test": {"exact": 0, "near": 0}}
