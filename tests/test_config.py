"""The Hydra boundary: what a run's identity depends on, what may be instantiated, how errors read."""

import pytest
from omegaconf import OmegaConf

from flora.config import instantiate, one_line, run_id
from flora.errors import ConfigError


def config(**changes):
    base = {
        "mode": "train",
        "checkpoint": None,
        "seed": 0,
        "force": False,
        "task": {"dataset": "eurosat"},
        "model": {"name": "convnext"},
        "adapter": {"r": 8},
        "trainer": {"lr": 1e-3, "num_workers": 0, "device": "auto", "log_every": 10},
        "protocol": {"name": "holdout"},
        "logger": {"mode": "offline"},
        "paths": {"output": "outputs"},
        "debug": {"trace": False},
    }
    return OmegaConf.merge(OmegaConf.create(base), OmegaConf.create(changes))


@pytest.mark.parametrize(
    "change",
    [
        {"paths": {"output": "/elsewhere"}},
        {"logger": {"mode": "online"}},
        {"force": True},
        {"debug": {"trace": True}},
        {"trainer": {"num_workers": 4}},
        {"adapter": {"lr": 1e-2}},
    ],
)
def test_what_does_not_change_the_result_keeps_the_run_id(change):
    assert run_id(config(**change)) == run_id(config())


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"adapter": {"r": 16}}, {"trainer": {"lr": 2e-3}}, {"task": {"dataset": "dtd"}}]
)
def test_what_changes_the_result_changes_the_run_id(change):
    assert run_id(config(**change)) != run_id(config())


@pytest.mark.parametrize("off", [None, False, 0.0, []])
def test_a_new_option_that_is_off_keeps_old_run_ids(off):
    assert run_id(config(adapter={"r": 8, "new_option": off})) == run_id(config())
    assert run_id(config(adapter={"r": 8, "new_option": 1})) != run_id(config())


def test_the_rate_counts_unless_the_grid_chooses_it():
    grid = {"protocol": {"lr_grid": [1e-3, 1e-2]}}
    assert run_id(config(**grid, trainer={"lr": 2e-3})) == run_id(config(**grid))
    assert run_id(config(**grid, trainer={"head_lr": 2e-3})) != run_id(config(**grid))


def test_a_checkpoint_counts_by_content_not_by_path():
    assert run_id(config(checkpoint="/a"), "abc") == run_id(config(checkpoint="/b"), "abc")
    assert run_id(config(checkpoint="/a"), "abc") != run_id(config(checkpoint="/a"), "abd")


@pytest.mark.parametrize("target", ["os.system", "subprocess.run", "florax.evil"])
def test_a_target_outside_the_package_is_refused_at_any_depth(target):
    node = OmegaConf.create({"_target_": "flora.training.NoLogger", "inner": [{"_target_": target}]})
    with pytest.raises(ConfigError, match="not allowed"):
        instantiate(node)


def test_an_unknown_key_is_a_config_error_that_names_it():
    node = OmegaConf.create({"_target_": "flora.training.Paths", "data": "d", "output": "o", "results": "r", "dat": 1})
    with pytest.raises(ConfigError, match="dat"):
        instantiate(node)


def test_a_value_that_the_constructor_rejects_keeps_its_own_message():
    node = OmegaConf.create({"_target_": "flora.training.TrainerSettings", "epochs": 0, "lr": 1, "head_lr": 1})
    with pytest.raises(ConfigError, match=r"trainer\.epochs must be a positive number"):
        instantiate(node)


def test_error_messages_become_one_line():
    assert one_line(ValueError("first\n\n  second\nfirst")) == "first; second"
