"""The Hydra boundary: what a run's identity depends on, what may be instantiated, how errors read."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from flora.config import HEAD_ALONE, _check_target, cell_id, composed, instantiate, instantiate_method, one_line
from flora.errors import ConfigError
from flora.files import ROOT


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
        {"trainer": {"cuda_graph": False}},
        {"trainer": {"cuda_graph": True}},
        {"adapter": {"lr": 1e-2}},
    ],
)
def test_what_does_not_change_the_result_keeps_the_run_id(change):
    assert cell_id(config(**change)) == cell_id(config())


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"adapter": {"r": 16}}, {"trainer": {"lr": 2e-3}}, {"task": {"dataset": "dtd"}}]
)
def test_what_changes_the_result_changes_the_run_id(change):
    assert cell_id(config(**change)) != cell_id(config())


@pytest.mark.parametrize("off", [None, False, 0.0, []])
def test_a_new_option_that_is_off_keeps_old_run_ids(off):
    assert cell_id(config(adapter={"r": 8, "new_option": off})) == cell_id(config())
    assert cell_id(config(adapter={"r": 8, "new_option": 1})) != cell_id(config())


def test_no_warm_up_and_a_head_that_stands_still_are_no_defaults():
    for zero in ("trainer.warmup_steps=0", "trainer.head_lr=0"):
        assert cell_id(composed([zero])) != cell_id(composed([]))


@pytest.mark.parametrize(
    ("zero", "null"),
    [
        ({"scale": 0}, {"scale": None}),
        ({"scale": 0.0}, {}),
        ({"scale": None, "alpha": 0}, {"scale": None, "alpha": None}),
        ({"stack_modes": []}, {"stack_modes": None}),
        ({"init_weights": False}, {}),
        ({"scale_pattern": {"stem": 0.0}}, {"scale_pattern": {}}),
        ({"scale_pattern": [{"pattern": "stem", "scale": 0.0}]}, {"scale_pattern": [{"pattern": "stem"}]}),
    ],
)
def test_a_zero_that_is_not_off_changes_the_run_id(zero, null):
    assert cell_id(config(adapter=zero)) != cell_id(config(adapter=null))


def test_the_rate_counts_unless_the_grid_chooses_it():
    grid = {"protocol": {"lr_grid": [1e-3, 1e-2]}}
    assert cell_id(config(**grid, trainer={"lr": 2e-3})) == cell_id(config(**grid))
    assert cell_id(config(**grid, trainer={"head_lr": 2e-3})) != cell_id(config(**grid))


def test_options_of_a_grid_count_once_they_are_set():
    grid = ["adapter=lora", "protocol.lr_grid=[1e-3,1e-2]"]
    heads = [*grid, "protocol.head_lr_grid=[1e-3,1e-2]"]
    assert cell_id(composed([*grid, "protocol.extend=true"])) != cell_id(composed(grid))
    assert cell_id(composed(heads)) != cell_id(composed(grid))
    assert cell_id(composed([*heads, "trainer.head_lr=5e-3"])) == cell_id(composed(heads)), "the grid chooses it"
    probe = ["adapter=linear_probe", *grid[1:]]
    assert cell_id(composed(["adapter=linear_probe", *heads[1:]])) == cell_id(composed(probe)), "its grid is the head's"


def test_a_grid_of_a_probe_is_over_the_heads_rate_which_counts_no_more():
    asked = ["task=instruct", "adapter=linear_probe"]
    grid = "protocol.lr_grid=[5e-4,1e-3,2e-3]"
    assert cell_id(composed([*asked, grid])) == cell_id(composed([*asked, grid, "trainer.head_lr=5e-3"]))
    assert cell_id(composed(asked)) != cell_id(composed([*asked, "trainer.head_lr=5e-3"]))
    probes = [
        p.stem for p in (ROOT / "configs" / "adapter").glob("*.yaml") if "flora.methods.LinearProbe" in p.read_text()
    ]
    assert sorted(probes) == sorted(HEAD_ALONE)


def test_a_checkpoint_counts_by_content_not_by_path():
    assert cell_id(config(checkpoint="/a"), "abc") == cell_id(config(checkpoint="/b"), "abc")
    assert cell_id(config(checkpoint="/a"), "abc") != cell_id(config(checkpoint="/a"), "abd")


@pytest.mark.parametrize("target", ["os.system", "subprocess.run", "florax.evil"])
def test_a_target_outside_the_package_is_refused_at_any_depth(target):
    node = OmegaConf.create({"_target_": "flora.training.NoLogger", "inner": [{"_target_": target}]})
    with pytest.raises(ConfigError, match="not allowed"):
        instantiate(node)


@pytest.mark.parametrize(
    "target",
    [
        "hydra.utils.get_method",
        "flora.config.hydra.utils.get_method",
        "flora.methods.base.importlib.import_module",
        "flora.results.record.os.system",
        "flora.results.record.subprocess.Popen",
        "flora.files.write_json",
        "flora.results.record.Path",
        "flora.training.NoLogger.__init__.__globals__",
        "flora.no.such.thing",
        "flora.",
    ],
)
@pytest.mark.parametrize("nest", ["itself", "_args_", "dict in list", "interpolated"])
def test_no_name_walks_through_our_modules_into_others(target, nest, tmp_path):
    evil = {"_target_": target, "_args_": [f"touch {tmp_path}/evil"]}
    good = {"_target_": "flora.training.NoLogger"}
    nodes = {
        "itself": evil,
        "_args_": good | {"_args_": [evil]},
        "dict in list": good | {"inner": [[{"deep": evil}]]},
        "interpolated": good | {"name": target, "inner": {"_target_": "${..name}"}},
    }
    with pytest.raises(ConfigError, match=r"_target_ .* (not allowed|cannot be found)"):
        instantiate(OmegaConf.create(nodes[nest]))
    assert list(tmp_path.iterdir()) == []


def test_every_target_of_our_configs_is_allowed():
    named = {
        line.split(":", 1)[1].strip()
        for path in Path("configs").rglob("*.yaml")
        if path.parts[1] != "hydra"  # Hydra's own
        for line in path.read_text().splitlines()
        if line.startswith("_target_:")
    }
    assert len(named) > 15
    for target in named:
        _check_target(target)


@pytest.mark.parametrize("adapter", ["lora", "full", "bitfit", "adalora"])
def test_rates_of_an_adapter_are_the_trainers_and_no_setting_of_the_method(adapter):
    cfg = composed([f"adapter={adapter}", "adapter.lr=0.5", "adapter.head_lr=0.25"])
    assert (cfg.trainer.lr, cfg.trainer.head_lr) == (0.5, 0.25)
    method = instantiate_method(cfg.adapter)  # whose constructor would not take them
    assert not {"lr", "head_lr"} & getattr(method, "options", {}).keys()


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


def test_flora_takes_smaller_steps_on_texts_unless_told_otherwise():
    for task in ("text", "glue", "commonsense", "instruct"):
        assert composed([f"task={task}", "adapter=flora"]).adapter.scale == 0.25
    assert composed(["task=vtab", "adapter=flora"]).adapter.scale == 1.0
    assert composed(["task=glue", "adapter=flora", "adapter.scale=2"]).adapter.scale == 2
