"""Annotated images and detections that tests draw."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from flora.tasks.detect.objects import Annotated, Objects, Part

HEIGHT, WIDTH, SIDE = 240, 320, 28


def drawn(seed: int, images: int = 40, masks: bool = False, names: tuple[str, ...] = ("a", "b", "c")) -> Annotated:
    """Images of 240 x 320 with up to eight boxes each, of all of COCO's sizes, some of them crowds."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 9, images)
    total = int(counts.sum())
    corner = rng.uniform(0, (WIDTH - 10, HEIGHT - 10), (total, 2))
    side = rng.uniform(2, np.minimum(150, (WIDTH, HEIGHT) - corner))
    boxes = np.concatenate([corner, side], axis=1)
    outlines = [[polygon(box, rng)] for box in boxes] if masks else None
    objects = Objects(
        boxes,
        rng.integers(0, len(names), total),
        rng.random(total) < 0.1,
        boxes[:, 2] * boxes[:, 3],
        outlines,
        np.cumsum([0, *counts]),
    )
    sizes = np.tile([HEIGHT, WIDTH], (images, 1))
    openers = [lambda: None] * images
    return Annotated.of([Part(openers, [f"{i}.png" for i in range(images)], sizes, objects)], list(names))


def polygon(box: np.ndarray, rng: np.random.Generator) -> list[float]:
    """Eight points on the ellipse in a box."""
    angle = np.sort(rng.uniform(0, 2 * np.pi, 8))
    x, y, w, h = box
    return np.stack([x + w / 2 * (1 + np.cos(angle)), y + h / 2 * (1 + np.sin(angle))], axis=1).ravel().tolist()


def guesses(annotated: Annotated, seed: int, masks: bool = False, most: int = 30) -> np.ndarray:
    """Detections near the objects, some twice and some of another class, with scores that are often equal."""
    rng = np.random.default_rng(seed)
    objects, rows = annotated.objects, []
    width = 6 + (SIDE * SIDE if masks else 0)
    for image in range(len(annotated)):
        found = np.full((most, width), -100.0, np.float32)
        near = [i for i in range(*objects.of(image).indices(len(objects.boxes))) for _ in range(rng.integers(0, 4))]
        for row, i in zip(found, near, strict=False):
            x, y, w, h = objects.boxes[i] + rng.normal(0, 4, 4)
            label = objects.classes[i] if rng.random() < 0.8 else rng.integers(0, len(annotated.class_names))
            row[:6] = x, y, x + max(w, 1), y + max(h, 1), np.round(rng.random(), 2), label
            row[6:] = rng.random(width - 6) < 0.8
        rows.append(found)
    return np.stack(rows)


SQUARES = ("red", "green", "blue")


def squares(seed: int, count: int, size: tuple[int, int] = (48, 64)) -> list[tuple[np.ndarray, list, list]]:
    """Images uint8 ``[H, W, 3]`` of squares of three colours on grey, with their boxes and classes; the first empty."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        height, width = size if number % 2 else size[::-1]
        image = np.full((height, width, 3), 90, np.uint8)
        boxes, classes = [], []
        for _ in range(0 if number == 0 else rng.integers(1, 4)):
            side = int(rng.integers(12, 24))
            x, y, label = (
                int(rng.integers(0, width - side)),
                int(rng.integers(0, height - side)),
                int(rng.integers(0, 3)),
            )
            image[y : y + side, x : x + side] = 255 * np.eye(3, dtype=np.uint8)[label]
            boxes.append([float(number) for number in (x, y, side, side)])
            classes.append(label)
        made.append((image, boxes, classes))
    return made


def encoded(image: np.ndarray) -> bytes:
    """As a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def write_parquet(path: Path, made: list, names: Sequence[str] = SQUARES) -> None:
    """As the Hugging Face layout has annotated images."""
    category = datasets.List(datasets.ClassLabel(names=list(names)))
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "image_id": datasets.Value("int64"),
            "width": datasets.Value("int32"),
            "height": datasets.Value("int32"),
            "objects": {"bbox": datasets.List(datasets.List(datasets.Value("float32"))), "category": category},
        }
    )
    rows = [
        {
            "image": {"bytes": encoded(image) if isinstance(image, np.ndarray) else image, "path": f"{number}.png"},
            "image_id": number,
            "width": image.shape[1] if isinstance(image, np.ndarray) else 64,
            "height": image.shape[0] if isinstance(image, np.ndarray) else 48,
            "objects": {"bbox": boxes, "category": classes},
        }
        for number, (image, boxes, classes) in enumerate(made)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=features.arrow_schema)
    pq.write_table(table, path)


def write_coco(folder: Path, split: str, made: list, names: Sequence[str] = SQUARES, **change: Any) -> dict[str, Any]:
    """As COCO's official files, ids from 10 by tens; returns what the annotation file says.

    Every second mask is a run-length encoding, the others are polygons.
    """
    (folder / split).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for number, (image, boxes, classes) in enumerate(made):
        height, width = image.shape[:2]
        (folder / split / f"{number:03}.png").write_bytes(encoded(image))
        images.append({"id": 10 * number, "file_name": f"{number:03}.png", "height": height, "width": width})
        for (x, y, w, h), label in zip(boxes, classes, strict=True):
            outline: Any = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            if len(annotations) % 2:
                whole = np.zeros((height, width), np.uint8)
                whole[int(y) : int(y + h), int(x) : int(x + w)] = 1
                runs = np.diff(np.flatnonzero(np.diff(whole.ravel("F"), prepend=0, append=2)), prepend=0)
                outline = {"size": [height, width], "counts": runs.tolist()}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 * number,
                    "category_id": 10 * (label + 1),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": outline,
                }
            )
    categories = [{"id": 10 * (i + 1), "name": name} for i, name in enumerate(names)]
    whole = {"images": images, "annotations": annotations[::-1], "categories": categories[::-1]} | change
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(whole))
    return whole
