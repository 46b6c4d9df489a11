"""dSprites, re-rendered: white squares, ellipses and hearts on black, in every combination of five factors.

The factors are those of dSprites (Matthey et al. 2017, github.com/google-deepmind/dsprites-dataset, zlib licence): 3
shapes, 6 scales ``linspace(0.5, 1, 6)``, 40 orientations ``linspace(0, 2 pi, 40)`` (the last equals the first), 32 x 32
positions, 64 x 64 pixels, black and white without grey. The published renderer's sizes are not documented; ours are
below, so scores are close in kind but not comparable digit by digit: say "re-rendered" beside them.

Geometry, in pixels, x to the right and y down, angles turning from x towards y. Positions are one pixel apart: the
centre of area lies on the pixel (16 + x index, 16 + y index), so that every sprite stays inside and a step moves it
exactly. A pixel is white if its centre lies in the shape. At scale 1 the areas are close to one another, and no
edge runs through pixel centres where rounding would decide.
"""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np

SHAPES = ("square", "ellipse", "heart")
SCALES = np.linspace(0.5, 1, 6)
ORIENTATIONS = np.linspace(0, 2 * np.pi, 40)
POSITIONS = 32
SIZE = 64
FACTORS = (len(SHAPES), len(SCALES), len(ORIENTATIONS), POSITIONS, POSITIONS)
COMBINATIONS = int(np.prod(FACTORS))
CLASSES = 16
VTAB_TEST_SIZE = COMBINATIONS // 10

SQUARE_HALF_SIDE = 9.25
ELLIPSE_SEMI_AXES = (14.2, 7.1)
HEART_RADIUS = 6.6
# A heart is a square standing on a corner, of side 2 r, with a half-disc of radius r on each upper side. This is how
# far its centre of area lies above the square's centre, in units of r.
_HEART_CENTROID = np.pi * (1 + 4 / (3 * np.pi)) / (np.sqrt(2) * (4 + np.pi))

_STAMP = SIZE - POSITIONS + 1


def factors_of(combination: np.ndarray) -> np.ndarray:
    """Indices int64 ``[N]`` in ``[0, 737280)`` to factors int64 ``[N, 5]``: shape, scale, orientation, x, y.

    The order of dSprites: y runs fastest.
    """
    return np.stack(np.unravel_index(combination, FACTORS), axis=1)


def location_labels(factors: np.ndarray) -> np.ndarray:
    """VTAB's dsprites_location: the x position ``[N]`` in 16 classes, floor(16 x / 32)."""
    return CLASSES * factors[:, 3] // POSITIONS


def orientation_labels(factors: np.ndarray) -> np.ndarray:
    """VTAB's dsprites_orientation: the angle ``[N]`` in 16 classes, floor(16 o / 40).

    Symmetric shapes make it ambiguous: a square looks the same four times round, an ellipse twice.
    """
    return CLASSES * factors[:, 2] // len(ORIENTATIONS)


def render(factors: np.ndarray) -> np.ndarray:
    """Draw factors int64 ``[N, 5]`` as uint8 ``[N, 64, 64]`` of 0 and 255."""
    shape, scale, orientation, x, y = factors.T
    images = np.zeros((len(factors), SIZE, SIZE), np.uint8)
    # A position is a whole pixel: placing a sprite is copying its stamp.
    places = np.lib.stride_tricks.sliding_window_view(images, (_STAMP, _STAMP), axis=(1, 2), writeable=True)
    places[np.arange(len(factors)), y, x] = _stamps()[shape, scale, orientation]
    return images


def fingerprint(images: np.ndarray, labels: np.ndarray) -> str:
    """Sha256 of rendered images and labels, so that a record shows a change of the renderer."""
    digest = hashlib.sha256(np.packbits(images > 0).tobytes())
    digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()


@cache
def _stamps() -> np.ndarray:
    """Every shape, scale and orientation once, uint8 ``[3, 6, 40, 33, 33]``, centred."""
    offset = np.arange(_STAMP) - _STAMP // 2
    x, y = offset[None, :], offset[:, None]
    angle = ORIENTATIONS[:, None, None]
    turned_x, turned_y = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    inside = (_in_square, _in_ellipse, _in_heart)
    masks = [[contains(turned_x / scale, turned_y / scale) for scale in SCALES] for contains in inside]
    return np.asarray(masks, np.uint8) * 255


def _in_square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) <= SQUARE_HALF_SIDE


def _in_ellipse(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    a, b = ELLIPSE_SEMI_AXES
    return (x / a) ** 2 + (y / b) ** 2 <= 1


def _in_heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x) / HEART_RADIUS, y / HEART_RADIUS - _HEART_CENTROID
    corner = np.sqrt(0.5)
    # The half-discs complete to whole discs inside the square.
    return (x + np.abs(y) <= 2 * corner) | ((x - corner) ** 2 + (y + corner) ** 2 <= 1)
