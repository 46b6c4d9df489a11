"""Photographs of retinas as VTAB shows them: tensorflow_datasets' diabetic_retinopathy_detection/btgraham-300.

The processing is that of the winner of Kaggle's competition of 2015: eyes of one size, local averages taken away, the
rim cut off. tensorflow_datasets does it with OpenCV; here the same formulas run in torch and scipy.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

RADIUS = 300  # pixels, of the eye
_KEPT = 0.9  # of the radius
_QUALITY = 72  # of the JPEG


def processed(image: Image.Image) -> Image.Image:
    """A photograph as a JPEG of at most 540 x 540 pixels.

    It is grey (128) outside the eye, and inside where nothing stands out. Pixels inside are
    ``4 (image - blurred) + 128``, with a Gaussian blur whose deviation is a thirtieth of the radius.
    """
    pixels = _eye_of_radius(np.asarray(image.convert("RGB")))
    blurred = gaussian_filter(pixels.astype(np.float32), (RADIUS / 30, RADIUS / 30, 0), mode="mirror", truncate=3)
    sharp = np.clip(4.0 * pixels - 4.0 * np.rint(blurred) + 128, 0, 255)
    height, width, _ = pixels.shape
    kept = int(RADIUS * _KEPT)
    rows, columns = np.ogrid[:height, :width]
    inside = (rows - height // 2) ** 2 + (columns - width // 2) ** 2 <= kept**2
    shown = np.where(inside[..., None], sharp, 128).astype(np.uint8)
    top, left = max(height // 2 - kept, 0), max(width // 2 - kept, 0)
    stream = io.BytesIO()
    Image.fromarray(shown[top : height // 2 + kept, left : width // 2 + kept]).save(stream, "JPEG", quality=_QUALITY)
    return Image.open(stream)


def _eye_of_radius(pixels: np.ndarray) -> np.ndarray:
    """Scale ``[H, W, 3]`` so that the eye, what is not black on the middle row, has the radius ``RADIUS``."""
    line = pixels[len(pixels) // 2].sum(axis=1, dtype=np.int64)
    radius = (line > line.mean() / 10).sum() / 2
    scale = RADIUS / (radius if radius >= 1 else len(pixels) / 2)
    size = [max(1, round(side * scale)) for side in pixels.shape[:2]]
    planes = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
    scaled = torch.nn.functional.interpolate(planes, size, mode="bilinear", antialias=False)
    return scaled[0].permute(1, 2, 0).round().byte().numpy()
