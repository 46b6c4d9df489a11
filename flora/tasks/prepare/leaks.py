"""Images that two splits share: equal ones, and those that a perceptual hash does not tell apart.

The hash is the usual one of the cosine transform (Zauner 2010, "Implementation and Benchmarking of Perceptual Image
Hash Functions"): the signs of an image's lowest frequencies against their median. It survives another size, another
encoding and small changes of brightness, not a flip or a crop. Drawings that differ in a detail look equal to it, and
an image without detail may be missed once it is encoded anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np
from PIL import Image
from scipy.fft import dctn

from flora.errors import DataError
from flora.tasks.images.decode import as_rgb

SIDE = 16  # frequencies of rows and of columns
BITS = SIDE**2
NEAR = 24  # bits of BITS that may differ: other photographs differ in 60 and more, the same ones as JPEG in up to 20
_CHUNK = 256
Opener = Callable[[], Image.Image]


def count(splits: Mapping[str, Sequence[Opener]]) -> dict[str, dict[str, int]]:
    """Images that occur in two splits, for each pair of splits: ``{"train, test": {"exact": 2, "near": 5}}``.

    Args:
        splits: functions that open the images, by split; images that cannot be decoded are left out.

    Returns:
        Of the second split of a pair, how many images have the pixels of one of the first (``exact``), and how many
        others differ from one by at most ``NEAR`` bits of their hash (``near``).
    """
    sums, hashes = {}, {}
    for split, openers in splits.items():
        with ThreadPoolExecutor() as threads:
            found = [facts for facts in threads.map(_facts, openers) if facts is not None]
        sums[split] = [digest for digest, _ in found]
        hashes[split] = np.array([bits for _, bits in found], np.uint8).reshape(-1, BITS // 8)
    shared = {}
    for one, other in combinations(splits, 2):
        exact = np.isin(sums[other], sums[one])
        near = np.array([d <= NEAR for d in nearest(hashes[other], hashes[one])], bool) & ~exact
        shared[f"{one}, {other}"] = {"exact": int(exact.sum()), "near": int(near.sum())}
    return shared


def perceptual_hash(image: Image.Image) -> np.ndarray:
    """Uint8 ``[BITS / 8]`` of an image."""
    grey = image.convert("L").resize((4 * SIDE, 4 * SIDE), Image.Resampling.LANCZOS)
    lowest = dctn(np.asarray(grey, float), norm="ortho")[:SIDE, :SIDE].ravel()
    return np.packbits(lowest > np.median(lowest[1:]))  # the first is the mean brightness


def nearest(hashes: np.ndarray, others: np.ndarray) -> Iterator[int]:
    """The number of bits in which each hash ``[N, B]`` differs from the nearest of ``others`` ``[M, B]``, or all."""
    if not len(others):
        yield from [BITS] * len(hashes)
        return
    for start in range(0, len(hashes), _CHUNK):
        differing = hashes[start : start + _CHUNK, None] ^ others[None]
        yield from np.bitwise_count(differing).sum(-1, dtype=np.int64).min(1).tolist()


def _facts(opener: Opener) -> tuple[str, np.ndarray] | None:
    try:
        image = as_rgb(opener, "an image")
    except DataError:
        return None  # whoever reads it for a run says so
    pixels = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    return pixels, perceptual_hash(image)
