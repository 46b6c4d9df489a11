"""Data sets with two names: both are one run, known without importing a task."""

import pytest
from omegaconf import OmegaConf

from flora.config import cell_id, composed
from flora.tasks.aliases import VTAB, canonical


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
