"""KITTI's object data as VTAB splits them: by video, so that no two splits show frames of one drive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets
from torchvision.datasets.utils import download_url, extract_archive

from flora.models.weights import sha256_of
from flora.tasks.vtab import rules

SHA256 = {  # of the files that VTAB reads, as tensorflow_datasets lists them in url_checksums/kitti.txt
    "data_object_image_2.zip": "351c5a2aa0cd9238b50174a3a62b846bc5855da256b82a196431d60ff8d43617",
    "data_object_label_2.zip": "4efc76220d867e1c31bb980bbf8cbc02599f02a9cb4350effa98dbb04aaed880",
    "devkit_object.zip": "cfde67e531832618ea0fd4844f91e34a45068025e2bef79e278cb812dc2537d0",
}
_SHARE = 10  # percent of the videos, of validation and of test each
_SEED = 123


def folder_in(root: Path) -> Path:
    """Where torchvision looks for KITTI's unpacked files."""
    return root / datasets.Kitti.__name__ / "raw"


def fetch(root: Path) -> None:
    """Download and unpack what ``load`` reads; RuntimeError for a file with another checksum, which is removed."""
    folder = folder_in(root)
    for name, digest in SHA256.items():
        download_url(f"{datasets.Kitti.data_url}{name}", str(folder), name)
        if sha256_of(folder / name) != digest:
            (folder / name).unlink()  # else it stays in the way of the next attempt
            raise RuntimeError(f"{name} has not the sha256 {digest} and was removed: try again")
        extract_archive(str(folder / name), str(folder))


def load(root: Path) -> tuple[Any, dict[str, list[int]], list[int]]:
    """The images, the rows of each split, and the label of each image: the distance of the nearest vehicle in 4 steps.

    Raises:
        RuntimeError, OSError: files are missing.
    """
    images = datasets.Kitti(str(root))
    boxes_of = [images._parse_target(index) for index in range(len(images))]
    labels = [rules.kitti((box["type"], box["location"][2]) for box in boxes) for boxes in boxes_of]
    numbers = split_by_video(videos(folder_in(root) / "mapping"))
    row_of = {int(Path(file).stem): row for row, file in enumerate(images.images)}
    return images, {split: [row_of[n] for n in members if n in row_of] for split, members in numbers.items()}, labels


def videos(mapping: Path) -> list[str]:
    """The drive that each training image was taken from, by the number of the image.

    Args:
        mapping: the folder of the object development kit: line ``train_rand.txt[i]`` of ``train_mapping.txt``,
            counted from 1, names date, drive and frame of image i.
    """
    drives = [line.split()[1] for line in (mapping / "train_mapping.txt").read_text().splitlines()]
    return [drives[int(number) - 1] for number in (mapping / "train_rand.txt").read_text().split(",")]


def split_by_video(drives: list[str]) -> dict[str, list[int]]:
    """Numbers of images of train, validation and test, as tensorflow_datasets draws them (kitti 3.1 and later).

    A tenth of the videos, in the order of their names, is drawn for the test and as many of the rest for validation,
    by numpy's legacy generator with seed 123.
    """
    names = sorted(set(drives))
    share = max(1, _SHARE * len(names) // 100)
    generator = np.random.RandomState(_SEED)
    test = set(generator.choice(names, share, replace=False))
    validation = set(generator.choice(sorted(set(names) - test), share, replace=False))
    parts = ["test" if d in test else "validation" if d in validation else "train" for d in drives]
    return {split: [n for n, part in enumerate(parts) if part == split] for split in ("train", "validation", "test")}
