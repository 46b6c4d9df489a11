"""Folders of images, and the task that reads them."""

import numpy as np
from PIL import Image

from flora.tasks import ImageFolder
from tests.tasks.conftest import png


def write_tree(folder, splits=("train", "val"), classes=("ant", "bee"), each=10, start=0):
    for split in splits:
        for name in classes:
            for _ in range(each):
                path = folder / split / name / f"{start:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(start, (16, 16)))
                start += 1


def task(**options):
    return ImageFolder(**{"name": "imagefolder", "dataset": ".", "epochs": 1, "crop_pct": 1.0} | options)


def load(folder, **options):
    return task(**options).load(image_size=16, data_dir=folder)


def numbers(split):
    images = split.__getitems__(list(range(len(split))))["pixel_values"]
    return [int(image[0, 0, 0]) * 100 + int(image[1, 0, 0]) for image in images]


def photographs(folder, each=6):
    """Images in which a crop, a flip or a shade can be seen."""
    chance = np.random.RandomState(0)
    for place in [folder / split / name for split in ("train", "val") for name in ("ant", "bee")]:
        place.mkdir(parents=True)
        for number in range(each):
            Image.fromarray(chance.randint(0, 256, (24, 32, 3), np.uint8)).save(place / f"{number}.png")


def crops(split, seed, epoch, indices=(0,)):
    split.begin_epoch(seed, epoch)
    return split.__getitems__(list(indices))["pixel_values"]
