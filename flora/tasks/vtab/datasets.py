"""The datasets of VTAB-1K and their stand-ins: classes, labels, and the augmentation that keeps labels true."""

from __future__ import annotations

from dataclasses import dataclass

from flora.tasks.aliases import VTAB as ALIASES
from flora.tasks.base import check_dataset

TRAIN_SIZE, VALIDATION_SIZE = 800, 200


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a dataset without its files.

    Attributes:
        group: VTAB's: natural, specialized or structured.
        classes: how many there are.
        augment: the strongest augmentation that keeps the labels true.
        stands_for: the VTAB dataset that a stand-in replaces where that one cannot be had.
        folder: its name in published folders of official lists.
        column: of a parquet file, that holds the labels.
        first: the label of class 0.
    """

    group: str
    classes: int
    augment: str = "crop_flip"
    stands_for: str | None = None
    folder: str | None = None
    column: str = "label"
    first: int = 0


# A crop moves what distance, count and centre labels depend on; a flip turns digits and directions into others.
DATASETS = {
    "caltech101": DatasetInfo("natural", 102),
    "cifar100": DatasetInfo("natural", 100, folder="cifar"),
    "dtd": DatasetInfo("natural", 47),
    "flowers102": DatasetInfo("natural", 102, folder="oxford_flowers102"),
    "pets": DatasetInfo("natural", 37, folder="oxford_iiit_pet"),
    "sun397": DatasetInfo("natural", 397),
    "svhn": DatasetInfo("natural", 10, "crop"),
    "patch_camelyon": DatasetInfo("specialized", 2, "flip"),
    "eurosat": DatasetInfo("specialized", 10),
    "resisc45": DatasetInfo("specialized", 45),
    "diabetic_retinopathy": DatasetInfo("specialized", 5),
    "clevr_count": DatasetInfo("structured", 8, "flip"),
    "clevr_distance": DatasetInfo("structured", 6, "flip", folder="clevr_dist"),
    "dmlab": DatasetInfo("structured", 6, "flip"),
    "kitti": DatasetInfo("structured", 4, "flip"),
    "dsprites_location": DatasetInfo("structured", 16, "none", folder="dsprites_loc"),
    "dsprites_orientation": DatasetInfo("structured", 16, "none", folder="dsprites_ori"),
    "smallnorb_azimuth": DatasetInfo("structured", 18, "none", folder="smallnorb_azi"),
    "smallnorb_elevation": DatasetInfo("structured", 9, "flip", folder="smallnorb_ele"),
    "cifar10": DatasetInfo("natural", 10, stands_for="cifar100"),
    "dtd10": DatasetInfo("natural", 10, stands_for="dtd"),
    "rsscn7": DatasetInfo("specialized", 7, stands_for="resisc45"),
    "nlvr_count": DatasetInfo("structured", 18, "flip", "clevr_count", folder="nlvr", column="num_objects", first=3),
}


def canonical_name(dataset: str) -> str:
    """VTAB's name of a dataset; ConfigError with the nearest names if there is none."""
    check_dataset(dataset, DATASETS, ALIASES)
    return ALIASES.get(dataset, dataset)
