"""Annotated images and detections that tests draw."""

import numpy as np

from flora.tasks.detect.objects import Annotated, Objects, Part, joined

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
    return joined([Part(openers, [f"{i}.png" for i in range(images)], sizes, objects)], list(names))


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
