"""DOTA folders, annotated images and detections that tests draw."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from flora.tasks.detect.objects import Annotated, Part
from flora.tasks.oriented.objects import Oriented
from tests.models.test_quads import rotated
from tests.tasks.detect.made import encoded

NAMES = ("plane", "ship")
SIDE = 120


def drawn(seed: int, images: int = 30, classes: int = 3) -> Annotated:
    """Images of 120 x 120 with up to seven objects each, some of them difficult."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 8, images)
    total = int(counts.sum())
    corners = rotated(rng.uniform(5, 30, (total, 2)), rng.uniform(0, np.pi, total)) + rng.uniform(
        15, 105, (total, 1, 2)
    )
    objects = Oriented(corners, rng.integers(0, classes, total), rng.random(total) < 0.2, np.cumsum([0, *counts]))
    return annotated_of(objects, np.full((images, 2), SIDE), [f"class {i}" for i in range(classes)])


def annotated_of(objects: Oriented, sizes: np.ndarray, names: Sequence[str]) -> Annotated:
    """Images that cannot be opened, with these objects."""
    openers = [lambda: None] * len(sizes)
    return Annotated.of([Part(openers, [f"{i}.png" for i in range(len(sizes))], sizes, objects)], list(names))


def guesses(annotated: Annotated, seed: int, most: int = 40) -> np.ndarray:
    """Detections near the objects, some twice, some of another class, some of nothing."""
    rng = np.random.default_rng(seed)
    objects, found = annotated.objects, []
    for image in range(len(annotated)):
        rows = np.full((most, 10), -100.0)
        near = [i for i in range(*objects.of(image).indices(len(objects.classes))) for _ in range(rng.integers(0, 4))]
        for row, i in zip(rows, near, strict=False):
            quad = objects.corners[i] + rng.normal(0, 2, (1, 2)) + rng.normal(0, 0.7, (4, 2))
            label = objects.classes[i] if rng.random() < 0.85 else rng.integers(0, len(annotated.class_names))
            row[:] = *quad.ravel(), rng.random(), label
        for row in rows[len(near) : len(near) + 2]:
            quad = rotated(rng.uniform(5, 30, (1, 2)), rng.uniform(0, 3, 1))[0] + rng.uniform(20, 100, 2)
            row[:] = *quad.ravel(), rng.random(), rng.integers(0, len(annotated.class_names))
        found.append(rows)
    return np.stack(found)


def scenes(seed: int, count: int, side: int = 100) -> list[tuple[np.ndarray, list[str]]]:
    """Images of bright bars (planes) and dark squares (ships) on grey, with the lines of their labels; first, none."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        image = Image.new("RGB", (side, side - 20 * (number % 2)), (110, 110, 110))
        pen, lines = ImageDraw.Draw(image), []
        for k in range(0 if number == 0 else rng.integers(1, 4)):
            label = int(rng.integers(0, 2))
            sides = ((24.0, 8.0), (14.0, 14.0))[label]
            (quad,) = rotated(np.array([sides]), rng.uniform(0, np.pi, 1)) + rng.uniform(15, side - 35, 2)
            pen.polygon([tuple(point) for point in quad.tolist()], fill=((240, 220, 90), (20, 30, 80))[label])
            lines.append(" ".join(f"{x:.1f}" for x in quad.ravel()) + f" {NAMES[label]} {int(k == 2)}")
        made.append((np.asarray(image), lines))
    return made


def write_dota(folder: Path, split: str, made: list[tuple[np.ndarray, list[str]]]) -> None:
    """As DOTA's official files."""
    (folder / split / "images").mkdir(parents=True, exist_ok=True)
    (folder / split / "labelTxt").mkdir(exist_ok=True)
    for number, (image, lines) in enumerate(made):
        (folder / split / "images" / f"P{number:04}.png").write_bytes(encoded(image))
        text = "\n".join(["imagesource:GoogleEarth", "gsd:0.146343590398", *lines]) + "\n" if lines else ""
        (folder / split / "labelTxt" / f"P{number:04}.txt").write_text(text)


def write_photographs(folder: Path, count: int = 6, side: int = 64) -> None:
    """Noise in the place of RSSCN7's tables."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, split in enumerate(("train", "validation", "test")):
        rng = np.random.default_rng(number)
        rows = [
            {"image": {"bytes": encoded(rng.integers(60, 200, (side, side, 3), np.uint8)), "path": None}, "label": 0}
            for _ in range(count)
        ]
        table = pa.Table.from_pylist(rows)
        metadata = (
            b'{"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["a"], "_type": "ClassLabel"}}}}'
        )
        pq.write_table(table.replace_schema_metadata({b"huggingface": metadata}), folder / f"{split}.parquet")
