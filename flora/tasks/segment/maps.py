"""What is predicted of images as a whole: a class for each of their pixels, and the files that show them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from flora.tasks.base import Predicted
from flora.tasks.pictures import palette

NOTHING = -1  # the class of a pixel whose logits are not finite
_AT_ONCE = 1 << 28  # logits at the size of an image that are in memory
_IMAGE = 0.5  # of the image in the overlay


def maps(module: Callable[[Tensor], Tensor], images: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
    """The likeliest class of each pixel, at the size of the images themselves, as an evaluation calls it.

    Args:
        module: the network, in evaluation, or what slides it over images.
        images: floats ``[B, 3, h, w]``, filled up.
        sizes: of each: height and width in the batch, then those of the image itself.

    Returns:
        int32 ``[B, 2 + P]``: height, width and the classes row by row, -100 where others are larger.
    """
    rows = []
    for image, (height, width, *stored) in zip(images, sizes, strict=True):
        logits = module(image[None, :, :height, :width]).float()
        called = _largest(logits, (stored[0], stored[1]))
        rows.append(torch.cat([torch.tensor(stored, dtype=torch.int32, device=called.device), called.flatten()]))
    most = max(len(row) for row in rows)
    return torch.stack([F.pad(row, (0, most - len(row)), value=-100) for row in rows])


def _largest(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The class with the greatest logit, interpolated to a size: int32 ``[*size]``. Some classes at a time."""
    each = max(1, _AT_ONCE // (size[0] * size[1]))
    best = torch.full(size, -torch.inf, device=logits.device)
    called = torch.full(size, NOTHING, dtype=torch.int32, device=logits.device)
    wrong = torch.zeros(size, dtype=torch.bool, device=logits.device)
    for first, part in zip(range(0, logits.shape[1], each), logits.split(each, dim=1), strict=True):
        value, index = F.interpolate(part, size=size, mode="bilinear", align_corners=False)[0].max(dim=0)
        called = torch.where(value > best, (index + first).to(torch.int32), called)
        best = torch.maximum(best, value)
        wrong |= value.isnan()
    return called.masked_fill(wrong | ~best.isfinite(), NOTHING)


def of_row(row: np.ndarray) -> np.ndarray:
    """The classes int16 ``[H, W]`` of a row of ``maps``."""
    height, width = row[:2].tolist()
    return row[2 : 2 + height * width].reshape(height, width).astype(np.int16)


def write(predicted: Iterable[Predicted], names: Sequence[str], folder: Path) -> None:
    """Write what was predicted of images.

    ``maps/NAME.png`` holds the class of each pixel, a number from 0 in the order of ``classes.json``, with a colour for
    each class; ``overlays/NAME.jpg`` shows those over the image; ``predictions.csv`` has the share of each class.
    """
    colours = palette(len(names))
    legend = [{"class": n, "name": name, "colour": colours[n].tolist()} for n, name in enumerate(names)]
    (folder / "classes.json").write_text(json.dumps(legend, indent=1) + "\n", encoding="utf-8")
    with (folder / "predictions.csv").open("w", encoding="utf-8", newline="") as stream:
        lines = csv.writer(stream)
        lines.writerow(["path", "map", "overlay", *(f"share({name})" for name in names)])
        for one in predicted:
            classes: np.ndarray = one.said.classes
            places = [folder / "maps" / f"{one.name}.png", folder / "overlays" / f"{one.name}.jpg"]
            for place in places:
                place.parent.mkdir(parents=True, exist_ok=True)
            drawn = Image.fromarray(classes.astype(np.uint8))
            drawn.putpalette(colours.tobytes())
            drawn.save(places[0])
            coloured = (1 - _IMAGE) * colours[classes] + _IMAGE * np.asarray(one.image())
            Image.fromarray(coloured.astype(np.uint8)).save(places[1], quality=90)
            shares = np.bincount(classes.ravel(), minlength=len(names)) / classes.size
            lines.writerow([one.path, *(place.relative_to(folder) for place in places), *shares.tolist()])
