"""What is found in images, and the files that show it: COCO's results, and pictures with boxes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
from PIL import Image, ImageDraw

from flora.models import oriented
from flora.models.detection import FIELDS
from flora.tasks.base import Predicted
from flora.tasks.detect.scores import real, whole_masks
from flora.tasks.detect.sheet import LEAST
from flora.tasks.pictures import palette


@dataclass(frozen=True)
class Found:
    """An object that was found in an image.

    Attributes:
        label: name of its class.
        number: of its class, in the order of the names.
        score: in [0, 1].
        box: left, top, right and bottom in pixels of the image.
        mask: bool ``[H, W]``, which pixels are its; None where the network finds boxes alone.
        corners: four, x and y in pixels, of an oriented object, with ``box`` around them; None of an upright one.
    """

    label: str
    number: int
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None
    corners: tuple[tuple[float, float], ...] | None = None


def of_rows(rows: np.ndarray, names: Sequence[str], height: int, width: int) -> list[Found]:
    """What the rows of ``flora.models.detection.Detector`` say of an image of this size, the highest score first."""
    rows = real(rows)
    masks = (
        whole_masks(rows, height, width).astype(bool) if len(rows) and rows.shape[1] > FIELDS else [None] * len(rows)
    )
    found = []
    for (left, top, right, bottom, score, number), mask in zip(rows[:, :FIELDS].tolist(), masks, strict=True):
        found.append(Found(names[int(number)], int(number), score, (left, top, right, bottom), mask))
    return sorted(found, key=lambda one: -one.score)


def of_quads(rows: np.ndarray, names: Sequence[str]) -> list[Found]:
    """What the rows ``[D, 10]`` of ``flora.models.oriented`` say of an image, the highest score first."""
    found = []
    for *outline, score, number in real(rows, oriented.FIELDS - 1).tolist():
        x, y = outline[::2], outline[1::2]
        corners = tuple(zip(x, y, strict=True))
        found.append(Found(names[int(number)], int(number), score, (min(x), min(y), max(x), max(y)), None, corners))
    return sorted(found, key=lambda one: -one.score)


def write(predicted: Iterable[Predicted], names: Sequence[str], ids: Sequence[int], folder: Path) -> None:
    """Write what was found in images.

    ``predictions.json`` is a list as COCO's results have it, ``image_id`` the number of the image among the inputs,
    with the path as ``file_name`` and the class as ``category`` besides, and corners as a polygon in ``segmentation``;
    ``pictures/NAME.jpg`` shows the outlines of those with a score from ``LEAST``.

    Args:
        predicted: what was found, image by image.
        names: of the classes.
        ids: what the results call them.
        folder: to write to.
    """
    results: list[dict[str, Any]] = []
    colours = [tuple(colour) for colour in palette(len(names)).tolist()]
    for one in predicted:
        objects: list[Found] = one.said.objects
        results += [_result(one, found, ids[found.number]) for found in objects]
        place = folder / "pictures" / f"{one.name}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        _drawn(one.image(), [found for found in objects if found.score >= LEAST], colours).save(place, quality=90)
    (folder / "predictions.json").write_text(json.dumps(results) + "\n", encoding="utf-8")


def _result(one: Predicted, found: Found, category: int) -> dict[str, Any]:
    left, top, right, bottom = found.box
    result = {"image_id": one.number, "category_id": category, "bbox": [left, top, right - left, bottom - top]}
    result |= {"score": found.score, "file_name": one.path, "category": found.label}
    if found.corners is not None:
        result["segmentation"] = [[number for corner in found.corners for number in corner]]
    if found.mask is not None:
        rle = hotcoco.mask.encode(np.asfortranarray(found.mask.astype(np.uint8)))
        counts = rle["counts"]
        result["segmentation"] = rle | {"counts": counts.decode() if isinstance(counts, bytes) else counts}
    return result


def _drawn(image: Image.Image, objects: Sequence[Found], colours: Sequence[tuple[int, ...]]) -> Image.Image:
    pixels = np.array(image)
    for found in objects:
        if found.mask is not None:
            pixels[found.mask] = (0.6 * pixels[found.mask] + 0.4 * np.array(colours[found.number])).astype(np.uint8)
    image = Image.fromarray(pixels)
    draw, line = ImageDraw.Draw(image), max(1, round(max(image.size) / 400))
    for found in objects:
        left, top, right, bottom = found.box
        if found.corners is not None:
            draw.polygon(found.corners, outline=colours[found.number], width=line)
            left, top = min(found.corners, key=lambda corner: corner[1])
        else:
            draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=colours[found.number], width=line)
        said = f"{found.label} {found.score:.2f}".encode("latin-1", "replace").decode("latin-1")  # Pillow's own font
        room = draw.textbbox((left, top), said)
        draw.rectangle(room, fill=colours[found.number])
        draw.text((left, top), said, fill="white")
    return image
