"""Data sets with two names: both are one run, known without importing a task."""

import pytest
from omegaconf import OmegaConf

from flora.config import cell_id, composed
from flora.tasks.aliases import _NOT_AUGMENTED, VTAB, canonical
from flora.tasks.vtab.datasets import DATASETS


@pytest.mark.parametrize("alias", VTAB)
def test_an_alias_is_the_name_that_records_hold(alias):
    task = composed([f"task.dataset={alias}"]).task
    assert canonical(task) == VTAB[alias]
    assert canonical({"_target_": "flora.tasks.vtab.task.Vtab", "dataset": alias}) == VTAB[alias]


def test_other_names_and_the_names_of_other_tasks_stay():
    assert canonical(composed(["task.dataset=eurosat"]).task) == "eurosat"
    assert canonical(composed(["task=imagefolder", "task.dataset=dsprites_loc"]).task) == "dsprites_loc"
    assert canonical(OmegaConf.create({"_target_": "flora.tasks.Vtab"})) is None


def test_both_names_are_one_run():
    cfg, other = composed(["task.dataset=dsprites_loc"]), composed(["task.dataset=dsprites_location"])
    assert cell_id(cfg) != cell_id(other)
    cfg.task.dataset = canonical(cfg.task)
    assert cell_id(cfg) == cell_id(other)


def test_none_and_auto_ask_for_one_run_where_labels_bear_no_augmentation():
    assert {name for name, info in DATASETS.items() if info.augment == "none"} == set(_NOT_AUGMENTED)
    for name, same in (
        ("dsprites_location", True),
        ("dsprites_loc", True),
        ("smallnorb_azimuth", True),
        ("svhn", False),
    ):
        asked = ["task=vtab", f"task.dataset={name}"]
        auto = cell_id(composed([*asked, "task.augment=auto"]))
        assert (cell_id(composed([*asked, "task.augment=none"])) == auto) is same
