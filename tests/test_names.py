"""Names of classes in configs: public ones, which do not move, and the names that records hold."""

import importlib
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from flora.config import cell_id, composed, instantiate, instantiate_method
from flora.names import FORMER

CONFIGS = Path("configs")
METHODS = {old: new for old, new in FORMER.items() if not new.endswith("Config")}
CONFIG_CLASSES = {old: new for old, new in FORMER.items() if new.endswith("Config")}


def named(node, key=""):
    """Every class that a config names, Hydra's own section left out: nothing in it decides a run's id."""
    if isinstance(node, dict):
        return [name for key, value in node.items() if key != "hydra" for name in named(value, key)]
    if isinstance(node, list):
        return [name for value in node for name in named(value)]
    return [node] if key in ("_target_", "config_class") else []


FILES = [path for path in CONFIGS.rglob("*.yaml") if path.parts[1] != "hydra"]
NAMED = sorted({name for path in FILES for name in named(yaml.safe_load(path.read_text()))})


def test_configs_name_all_kinds_of_things():
    kinds = {name.rpartition(".")[0] for name in NAMED}
    assert kinds == {"flora", "flora.methods", "flora.models", "flora.tasks", "flora.training", "peft"}


@pytest.mark.parametrize("name", NAMED)
def test_a_config_names_what_a_package_exports(name):
    package, _, attribute = name.rpartition(".")
    home = importlib.import_module(package)
    assert attribute in home.__all__
    assert callable(getattr(home, attribute))


@pytest.mark.parametrize("public", sorted(FORMER.values()))
def test_a_recorded_class_is_still_exported(public):
    package, _, attribute = public.rpartition(".")
    assert attribute in importlib.import_module(package).__all__


ARGUMENTS = {
    "flora.methods.Peft": {"config_class": "peft.LoraConfig"},
    "flora.methods.AdaLora": {"r": 2},
}


@pytest.mark.parametrize("former", METHODS)
def test_a_former_name_makes_the_class_of_today(former):
    public = METHODS[former]
    node = OmegaConf.create({"_target_": former, "name": "method", **ARGUMENTS.get(public, {})})
    package, _, attribute = public.rpartition(".")
    for make in (instantiate, instantiate_method):
        assert type(make(node)) is getattr(importlib.import_module(package), attribute)


@pytest.mark.parametrize("former", CONFIG_CLASSES)
def test_a_former_config_class_is_the_class_of_today(former):
    node = {"_target_": "flora.adapters.methods.Peft", "name": "method", "config_class": former}
    package, _, attribute = CONFIG_CLASSES[former].rpartition(".")
    method = instantiate_method(OmegaConf.create(node))
    assert method.config_class is getattr(importlib.import_module(package), attribute)


@pytest.mark.parametrize("adapter", ["full", "linear_probe", "bitfit", "adalora", "lora", "lotr", "vpt"])
def test_a_config_of_former_names_is_the_same_run(adapter):
    today, before = composed([f"adapter={adapter}"]), composed([f"adapter={adapter}"])
    first = {new: old for old, new in FORMER.items()}
    before.adapter._target_ = first[today.adapter._target_]
    if "config_class" in before.adapter:
        before.adapter.config_class = first.get(today.adapter.config_class, today.adapter.config_class)
    assert cell_id(before) == cell_id(today)
