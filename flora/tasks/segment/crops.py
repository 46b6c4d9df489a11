"""An image and its mask under one random scale, crop and flip; the image under random colours."""

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as colours

from flora.tasks.images.decode import interpolation_mode
from flora.tasks.segment.datasets import IGNORED

# mmsegmentation's PhotoMetricDistortion: brightness of 32 in 255, contrast and saturation by a half, hue by 18 in 180.
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 32 / 128, 0.5, 0.5, 18 / 180
_TRIES, _MOST = 10, 0.75  # mmsegmentation's RandomCrop(cat_max_ratio=0.75) looks ten times for more than one class


def whole(image: Image.Image, size: int, interpolation: str) -> Image.Image:
    """An image whose short side has ``size`` pixels."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    return image if image.size == (width, height) else image.resize((width, height), interpolation_mode(interpolation))


def random_crop(
    image: Image.Image,
    labels: np.ndarray,
    random: np.random.RandomState,
    *,
    size: int,
    crop: int,
    scales: tuple[float, float],
    flip: bool,
    interpolation: str,
    fill: tuple[int, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """A square of an image that is scaled at random, as mmsegmentation trains: RandomResize, RandomCrop, RandomFlip.

    Args:
        image: RGB.
        labels: int16 ``[H, W]`` of its pixels.
        random: what is drawn from.
        size: short side of the image at scale 1.
        crop: side of the square; where the image is smaller, the rest is ``fill``, and does not count.
        scales: least and greatest factor.
        flip: left to right, with probability 1/2.
        interpolation: of the image; labels take the nearest.
        fill: red, green, blue in 0..255.

    Returns:
        uint8 ``[crop, crop, 3]`` and int16 ``[crop, crop]``.
    """
    scale = random.uniform(*scales) * size / min(image.size)
    height, width = (min(crop, max(1, round(side * scale))) for side in labels.shape)
    own = Image.fromarray(labels.astype(np.int32))  # Pillow's int16 cannot be resized
    for _ in range(_TRIES):
        # Only what the crop shows is resized.
        spans = [min(side, drawn / scale) for side, drawn in zip(labels.shape, (height, width), strict=True)]
        top, left = (random.uniform(0, side - span) for side, span in zip(labels.shape, spans, strict=True))
        box = (left, top, left + spans[1], top + spans[0])
        shown = np.asarray(own.resize((width, height), Image.Resampling.NEAREST, box)).astype(np.int16)
        counts = np.bincount(shown[shown >= 0])
        if np.count_nonzero(counts) > 1 and counts.max() < _MOST * counts.sum():
            break
    pixels = np.full((crop, crop, 3), fill, np.uint8)
    target = np.full((crop, crop), IGNORED, np.int16)
    pixels[:height, :width] = np.asarray(image.resize((width, height), interpolation_mode(interpolation), box))
    target[:height, :width] = shown
    if flip and random.uniform() < 0.5:
        pixels, target = pixels[:, ::-1], target[:, ::-1]
    return pixels, target


def distorted(pixels: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """An image uint8 ``[H, W, 3]`` with other brightness, contrast, saturation and hue, each with probability 1/2.

    As mmsegmentation's PhotoMetricDistortion, by torchvision's functions; contrast comes before or after the colours.
    """
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    drawn = {
        "brightness": 1 + random.uniform(-_BRIGHTNESS, _BRIGHTNESS),
        "contrast": 1 + random.uniform(-_CONTRAST, _CONTRAST),
        "saturation": 1 + random.uniform(-_SATURATION, _SATURATION),
        "hue": random.uniform(-_HUE, _HUE),
    }
    applied = {name for name in drawn if random.uniform() < 0.5}
    order = ["brightness", "contrast", "saturation", "hue"]
    if random.uniform() < 0.5:
        order = ["brightness", "saturation", "hue", "contrast"]
    for name in order:
        if name in applied:
            image = getattr(colours, f"adjust_{name}")(image, drawn[name])
    return image.permute(1, 2, 0).numpy()
