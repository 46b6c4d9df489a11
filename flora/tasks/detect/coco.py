"""COCO's layout: annotations/instances_SPLIT.json beside a folder of images for each split."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flora.errors import DataError, first_line
from flora.models.weights import sha256_of
from flora.tasks.detect.objects import Objects, Part, checked
from flora.tasks.images.formats import open_image

_NEEDED = "it needs images, annotations and categories"
PREFIX = "instances_"  # what follows it, train2017, is the name of the folder with the images


def read(path: Path, missing: str = "error") -> tuple[Part, list[str], dict[str, Any]]:
    """The images of one split, the names of the classes in the order of their ids, and facts of the file.

    Args:
        path: of the annotations.
        missing: ``error``, or ``skip``: an image that is not there is left to be counted as unreadable.

    Raises:
        DataError: the file cannot be read or is of other images, or an annotation does not fit.
    """
    whole = _loaded(path)
    try:
        categories = sorted(whole["categories"], key=lambda category: category["id"])
        index = {category["id"]: place for place, category in enumerate(categories)}
        if len(index) != len(categories):
            raise DataError(
                f"{path}: {len(categories) - len(index)} category ids are there twice: mend the annotations"
            )
        images = whole["images"]
        place = {image["id"]: number for number, image in enumerate(images)}
        sizes = np.array([[image["height"], image["width"]] for image in images], np.int64).reshape(-1, 2)
        names = [str(image["file_name"]) for image in images]
        annotations = [a for a in whole["annotations"] if _fits(path, a, place, index)]
        order = np.argsort([place[a["image_id"]] for a in annotations], kind="stable")
        annotations = [annotations[i] for i in order]
        objects = _objects(path, annotations, place, index, sizes)
        class_names = [str(category["name"]) for category in categories]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(
            f"{path} is no file of COCO's instances ({what}): it needs images, annotations and categories"
        ) from error
    if len(place) != len(images):
        raise DataError(f"{path}: {len(images) - len(place)} image ids are there twice: mend the annotations")
    folder = path.parent.parent / path.stem.removeprefix(PREFIX)
    _check_there(path, folder, names, missing)
    files = [folder / name for name in names]
    part = Part([partial(open_image, file) for file in files], [str(file) for file in files], sizes, objects)
    facts = {"rows": len(part), "sha256": sha256_of(path), "category_ids": [c["id"] for c in categories]}
    return checked(part, str(path)), class_names, {path.name: facts}


def _loaded(path: Path) -> dict[str, Any]:
    try:
        whole = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable JSON file ({first_line(error)}); fetch it again") from error
    if not isinstance(whole, dict):
        raise DataError(f"{path} is no file of COCO's instances: {_NEEDED}")
    return whole


def _fits(path: Path, annotation: dict[str, Any], images: dict[Any, int], classes: dict[Any, int]) -> bool:
    if annotation["image_id"] not in images:
        raise DataError(
            f"{path}: annotation {annotation['id']} is of image {annotation['image_id']}, which is not listed"
        )
    if annotation["category_id"] not in classes:
        raise DataError(
            f"{path}: annotation {annotation['id']} has the unknown class id {annotation['category_id']}; the file "
            f"names {len(classes)} classes"
        )
    return True


def _objects(
    path: Path, annotations: list[dict[str, Any]], images: dict[Any, int], classes: dict[Any, int], sizes: np.ndarray
) -> Objects:
    of = np.array([images[a["image_id"]] for a in annotations], np.int64)
    outlines = [a.get("segmentation") for a in annotations]
    for annotation, outline, image in zip(annotations, outlines, of, strict=True):
        if isinstance(outline, dict) and list(outline["size"]) != sizes[image].tolist():
            height, width = outline["size"]
            raise DataError(
                f"{path}: annotation {annotation['id']} has a mask of {width} x {height} pixels, its image has "
                f"{sizes[image][1]} x {sizes[image][0]}: mend the annotations"
            )
    boxes = np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)
    areas = [a.get("area", box[2] * box[3]) for a, box in zip(annotations, boxes, strict=True)]
    return Objects(
        boxes,
        np.array([classes[a["category_id"]] for a in annotations], np.int64),
        np.array([bool(a.get("iscrowd", 0)) for a in annotations], bool),
        np.array(areas, np.float64),
        outlines if all(outlines) else None,
        np.concatenate([[0], np.cumsum(np.bincount(of, minlength=len(sizes)))]).astype(np.int64),
    )


def _check_there(path: Path, folder: Path, names: list[str], missing: str) -> None:
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder} with the images of {path.name}: fetch it, or rename it so")
    flat = {entry.name for entry in os.scandir(folder)}
    absent = [name for name in names if name not in flat and not (folder / name).is_file()]
    if names and len(absent) == len(names):
        raise DataError(f"{path} is of another set: none of its {len(names)} images (first {names[0]}) is in {folder}")
    if absent and missing != "skip":
        raise DataError(
            f"{folder}: {len(absent)} of the {len(names)} images of {path.name} are not there (first {absent[0]}); "
            "fetch them or set task.unreadable=skip"
        )
