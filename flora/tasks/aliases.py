"""Data sets with two names, known without importing a task: a run has one id whichever name it is asked for by."""

from collections.abc import Mapping
from typing import Any

# VTAB's names in tensorflow_datasets and in published recipes -> the names of DATASETS.
VTAB = {
    "clevr_dist": "clevr_distance",
    "dsprites_loc": "dsprites_location",
    "dsprites_ori": "dsprites_orientation",
    "smallnorb_azi": "smallnorb_azimuth",
    "smallnorb_ele": "smallnorb_elevation",
}
# Bumped where the same files would give other splits; records of an earlier one are of other runs. nlvr: test images
# that are in train or validation as well are left out.
_VERSIONS = {"nlvr": 2, "nlvr_count": 2}
# Sets whose labels bear neither crop nor flip: ``auto`` asks for what ``none`` asks for.
_NOT_AUGMENTED = ("dsprites_location", "dsprites_orientation", "smallnorb_azimuth")
_OF_CLASS = {"Vtab": VTAB}


def canonical(task: Mapping[Any, Any]) -> Any:
    """What a task's config calls its data set, under the name that records hold; as it stands where there is no other.

    Args:
        task: the config, with the class under ``_target_``.
    """
    name = task.get("dataset")
    aliases = _OF_CLASS.get(str(task.get("_target_")).rpartition(".")[2], {})
    return aliases.get(name, name) if isinstance(name, str) else name


def data_version(task: Mapping[Any, Any]) -> int | None:
    """The version of the splits that a task's config asks for; None for the first."""
    name = task.get("dataset")
    return _VERSIONS.get(name) if isinstance(name, str) else None


def augmentation(task: Mapping[Any, Any]) -> Any:
    """What a task's config says of ``augment``, under the one name that records hold where two mean the same."""
    said = task.get("augment")
    return "auto" if said == "none" and canonical(task) in _NOT_AUGMENTED and _is_vtab(task) else said


def _is_vtab(task: Mapping[Any, Any]) -> bool:
    return str(task.get("_target_")).rpartition(".")[2] == "Vtab"
