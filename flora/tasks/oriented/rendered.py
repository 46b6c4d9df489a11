"""A rendered stand-in for DOTA: drawn planes, ships, vehicles and courts on RSSCN7's aerial photographs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from flora.errors import DataError
from flora.tasks import manifest
from flora.tasks.base import draw
from flora.tasks.detect.files import divided
from flora.tasks.detect.objects import Annotated, Part
from flora.tasks.images.parquet import opener, read_class_names
from flora.tasks.oriented.objects import Oriented

NAME = "rendered"
PHOTOGRAPHS = "rsscn7"
CLASSES = ["plane", "ship", "vehicle", "court"]
COUNTS = {"train": 300, "validation": 100, "test": 200}
VERSION = "1"  # of what is drawn: another one makes other runs
_FINE = 4  # pixels are drawn so many times finer
_LENGTHS = {"plane": (13, 30), "ship": (14, 34), "vehicle": (7, 12), "court": (15, 30)}  # in pixels
_WIDTHS = {"plane": (0.75, 1.0), "ship": (0.2, 0.32), "vehicle": (0.42, 0.55), "court": (0.48, 0.62)}  # of the length
_MOST = {"plane": 2, "ship": 3, "vehicle": 5, "court": 2}
_CLUTTER = 4
_COVERED = 0.15  # at most of an object's upright box, by another's

# Outlines from -1 to 1: along the object and across it. The first is the hull of the object.
_PLANE = (
    [(1, 0), (0.86, 0.09), (-0.9, 0.07), (-1, 0), (-0.9, -0.07), (0.86, -0.09)],
    [(0.28, 0.05), (-0.2, 1), (-0.38, 1), (-0.12, 0.05), (-0.12, -0.05), (-0.38, -1), (-0.2, -1), (0.28, -0.05)],
    [(-0.7, 0.04), (-0.88, 0.4), (-1, 0.4), (-0.92, 0), (-1, -0.4), (-0.88, -0.4), (-0.7, -0.04)],
)
_SHIP = ([(1, 0), (0.6, 0.85), (0.3, 1), (-0.9, 1), (-1, 0.7), (-1, -0.7), (-0.9, -1), (0.3, -1), (0.6, -0.85)],)
_BOX = ([(1, 1), (-1, 1), (-1, -1), (1, -1)],)


class Sprite(NamedTuple):
    """A drawn thing.

    Attributes:
        name: of its class; one of no class is clutter.
        middle: x and y in pixels.
        length, width: in pixels.
        angle: in radians.
        colours: of its body and of what is on it, RGB.
    """

    name: str
    middle: tuple[float, float]
    length: float
    width: float
    angle: float
    colours: tuple[tuple[int, ...], tuple[int, ...]]

    def at(self, outline: Any) -> np.ndarray:
        """Points along and across the thing, from -1 to 1, as x and y in pixels ``[n, 2]``."""
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        along, across = (np.asarray(outline, np.float64) * (self.length / 2, self.width / 2)).T
        return np.stack([along * cos - across * sin, along * sin + across * cos], axis=1) + self.middle


def scene(random: np.random.RandomState, width: int, height: int) -> list[Sprite]:
    """What is drawn on an image, in the order of drawing; clutter first, no object without room."""
    made: list[Sprite] = []
    boxes: list[np.ndarray] = []
    names = [name for name in CLASSES for _ in range(random.randint(0, _MOST[name] + 1))]
    for name in names or [CLASSES[random.randint(len(CLASSES))]]:
        for _ in range(20):
            low, high = _LENGTHS[name]
            length = float(np.exp(random.uniform(np.log(low), np.log(high))))
            breadth = length * random.uniform(*_WIDTHS[name])
            angle = random.uniform(0, 2 * np.pi)
            middle = random.uniform(0, width), random.uniform(0, height)
            sprite = Sprite(name, middle, length, breadth, angle, _colours(name, random))
            corners = sprite.at(_BOX[0])
            box = np.concatenate([corners.min(axis=0), corners.max(axis=0)])
            if (box < 0).any() or (box > [width, height, width, height]).any() or any(_covers(box, b) for b in boxes):
                continue
            made.append(sprite)
            boxes.append(box)
            break
    clutter = []
    for _ in range(random.randint(0, _CLUTTER + 1)):
        length = random.uniform(6, 22)
        middle = random.uniform(0, width), random.uniform(0, height)
        name = ("disc", "triangle", "slab")[random.randint(3)]
        shade = _colours("vehicle", random)
        angle = random.uniform(0, 7)
        clutter.append(Sprite(name, middle, length, length * random.uniform(0.6, 1), angle, shade))
    return [*clutter, *made]


def painted(photograph: Callable[[], Image.Image], sprites: list[Sprite]) -> Image.Image:
    """A photograph with things on it, each with a shadow."""
    with photograph() as opened:
        image = opened.convert("RGB")
    size = image.size
    fine = image.resize((size[0] * _FINE, size[1] * _FINE), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(fine, "RGBA")
    for sprite in sprites:
        _paint(pen, sprite)
    return fine.resize(size, Image.Resampling.BOX)  # where nothing was drawn, the photograph again


def open_rendered(data: Path, seed: int) -> tuple[Annotated, dict[str, np.ndarray], dict[str, Any]]:
    """All images, the rows of the three splits, and facts; drawn when they are opened.

    Each split's photographs are drawn from the same split of RSSCN7.

    Args:
        data: the folder that has rsscn7.
        seed: of what is drawn.

    Raises:
        DataError: the photographs are not there, or too few.
    """
    parts, tables = {}, files(data)
    manifest.check(data / PHOTOGRAPHS, [*tables.values()])
    for split, path in tables.items():
        read_class_names([path], None)  # a table of images
        cells = pq.read_table(path, columns=["image"])["image"].to_pylist()
        if len(cells) < COUNTS[split]:
            raise DataError(
                f"{path} has {len(cells)} images, task.dataset={NAME} needs {COUNTS[split]}: fetch it again"
            )
        parts[split] = _part(path, cells, split, seed)
    annotated, rows, said = divided(data / PHOTOGRAPHS, parts, CLASSES, 0.0, seed)
    rule = f"drawn on photographs of the same split of {PHOTOGRAPHS}, seed {seed}"
    facts = {"source": NAME, "photographs": PHOTOGRAPHS, "sha256": {NAME: _digest(annotated)}}
    return annotated, rows, facts | said | {"split_rule": rule}


def files(data: Path) -> dict[str, Path]:
    """The tables of photographs of each split; DataError where there are none."""
    found = {split: data / PHOTOGRAPHS / f"{split}.parquet" for split in COUNTS}
    if missing := [path for path in found.values() if not path.is_file()]:
        raise DataError(
            f"there is no {missing[0]}: task.dataset={NAME} is drawn on the photographs of {PHOTOGRAPHS}; fetch them, "
            "or set paths.data"
        )
    return found


def _part(path: Path, cells: list[dict[str, Any]], split: str, seed: int) -> Part:
    openers, names, sizes = list[Callable[[], Image.Image]](), list[str](), list[tuple[int, int]]()
    quads, classes, counts = list[np.ndarray](), list[int](), list[int]()
    for number in np.sort(draw(len(cells), seed)[: COUNTS[split]]).tolist():
        photograph = opener(path.parent, cells[number] or {})
        name = f"{NAME} on {path}, row {number}"
        try:
            with photograph() as image:
                width, height = image.size
        except Exception as error:  # Pillow raises almost any type on broken bytes
            raise DataError(f"{name}: the photograph cannot be opened: fetch {path} again") from error
        random = np.random.RandomState([seed, [*COUNTS].index(split), number])
        sprites = scene(random, width, height)
        things = [sprite for sprite in sprites if sprite.name in CLASSES]
        openers.append(partial(painted, photograph, sprites))
        names.append(name)
        sizes.append((height, width))
        quads += [sprite.at(_BOX[0]) for sprite in things]
        classes += [CLASSES.index(sprite.name) for sprite in things]
        counts.append(len(things))
    objects = Oriented(
        np.array(quads, np.float64).reshape(-1, 4, 2),
        np.array(classes, np.int64),
        np.zeros(len(classes), bool),
        np.cumsum([0, *counts]),
    )
    return Part(openers, names, np.array(sizes, np.int64), objects)


def _digest(annotated: Annotated) -> str:
    """Of what is drawn where; the photographs have their own."""
    whole = hashlib.sha256(VERSION.encode())
    objects: Oriented = annotated.objects
    for column in (objects.corners.round(6), objects.classes, objects.starts):
        whole.update(np.ascontiguousarray(column).tobytes())
    return whole.hexdigest()


def _covers(one: np.ndarray, other: np.ndarray) -> bool:
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    common = np.prod(np.maximum(high - low, 0))
    return bool(common > _COVERED * min(np.prod(box[2:] - box[:2]) for box in (one, other)))


def _colours(name: str, random: np.random.RandomState) -> tuple[tuple[int, ...], tuple[int, ...]]:
    body: tuple[int, ...]
    if name == "court":
        body = [(60, 120, 70), (150, 80, 60), (60, 90, 140), (120, 110, 90)][random.randint(4)]
    elif name == "plane":
        body = (random.randint(150, 240),) * 3
    else:
        grey = random.randint(40, 220)
        body = tuple(int(np.clip(grey + random.randint(-35, 36), 0, 255)) for _ in range(3))
    body = tuple(int(np.clip(part + random.randint(-20, 21), 0, 255)) for part in body)
    light = random.randint(190, 250) if np.mean(body) < 150 or name == "court" else random.randint(30, 90)
    return body, (light, light, light)


def _paint(pen: ImageDraw.ImageDraw, sprite: Sprite) -> None:
    body, mark = sprite.colours
    outlines: Any = {"plane": _PLANE, "ship": _SHIP}.get(sprite.name, _BOX)
    if sprite.name == "disc":
        turn = np.linspace(0, 2 * np.pi, 24)
        outlines = (np.stack([np.cos(turn), np.sin(turn) * sprite.length / sprite.width], axis=1),)
    if sprite.name == "triangle":
        outlines = ([(1, 0), (-1, 1), (-1, -1)],)
    for outline in outlines:
        _fill(pen, sprite.at(outline) + 1.0, (0, 0, 0, 90))
    for outline in outlines:
        _fill(pen, sprite.at(outline), body)
    if sprite.name == "ship":  # a bridge and a stripe
        _fill(pen, sprite.at([(-0.35, 0.6), (-0.75, 0.6), (-0.75, -0.6), (-0.35, -0.6)]), mark)
        _fill(pen, sprite.at([(0.55, 0.12), (-0.2, 0.12), (-0.2, -0.12), (0.55, -0.12)]), mark)
    if sprite.name == "vehicle":  # windows
        glass = (25, 30, 40) if np.mean(body) > 90 else mark
        _fill(pen, sprite.at([(0.45, 0.75), (0.15, 0.75), (0.15, -0.75), (0.45, -0.75)]), glass)
        _fill(pen, sprite.at([(-0.55, 0.7), (-0.75, 0.7), (-0.75, -0.7), (-0.55, -0.7)]), glass)
    if sprite.name == "court":  # its lines and its net
        for line in ([(0.8, 0.75), (-0.8, 0.75), (-0.8, -0.75), (0.8, -0.75), (0.8, 0.75)], [(0, 0.9), (0, -0.9)]):
            points = [(float(x), float(y)) for x, y in sprite.at(line) * _FINE]
            pen.line(points, fill=mark, width=max(1, round(0.6 * _FINE)))


def _fill(pen: ImageDraw.ImageDraw, points: np.ndarray, colour: tuple[int, ...]) -> None:
    pen.polygon([(float(x), float(y)) for x, y in points * _FINE], fill=colour)
