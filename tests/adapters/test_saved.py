"""Adapters saved before FLoRA and its rivals came to share a base, on which the files in ``saved`` were made."""

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import flora
from flora.methods import LoraFlatConfig

SAVED = Path(__file__).with_name("saved")


def base() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=2), nn.Flatten(), nn.Linear(24, 5))


@pytest.mark.parametrize(("name", "kind"), [("flora", flora.FloraConfig), ("lora_flat", LoraFlatConfig)])
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")  # fields that rivals had and refused
def test_every_parameter_is_loaded_under_its_name(name, kind):
    model = peft.PeftModel.from_pretrained(base(), str(SAVED / name))
    assert type(model.peft_config["default"]) is kind
    file = load_file(SAVED / name / "adapter_model.safetensors")
    loaded = peft.get_peft_model_state_dict(model)
    assert loaded.keys() == file.keys()
    assert all(torch.equal(loaded[key], value) for key, value in file.items())


def test_a_configuration_of_flora_keeps_its_fields():
    fields = json.loads((SAVED / "flora" / "adapter_config.json").read_text())
    config = flora.FloraConfig.from_pretrained(str(SAVED / "flora"))
    now = config.to_dict()
    assert {name: now[name] for name in fields} == fields
    assert not any(now[name] for name in now.keys() - fields.keys())  # what came later is off
    assert config.init == "orthogonal"  # the default when it was saved, and not today's


def test_a_default_start_is_written_down_so_that_another_default_changes_no_adapter(tmp_path):
    flora.FloraConfig().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init"] == "zero_output"


def test_the_updates_are_those_of_the_saved_parameters():
    model = peft.PeftModel.from_pretrained(base(), str(SAVED / "flora"))
    file = load_file(SAVED / "flora" / "adapter_model.safetensors")
    layer, name = model.base_model.model[0], "base_model.model.0.tucker"
    core = file[f"{name}_core.weight"].numpy()
    factors = [file[f"{name}_factors.weight_{mode}"].numpy() for mode in range(4)]
    scale = 6 / np.sqrt(4 * 3)  # alpha over the geometric mean of r = [4, 3]
    expected = scale * np.einsum("abcd,oa,ib,hc,wd->oihw", core, *factors)
    np.testing.assert_allclose(layer.get_delta_weight("default").detach().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_the_updates_of_a_rival_too():
    model = peft.PeftModel.from_pretrained(base(), str(SAVED / "lora_flat"))
    file = load_file(SAVED / "lora_flat" / "adapter_model.safetensors")
    a, b = (file[f"base_model.model.1.tucker_factors.{name}"].numpy() for name in "AB")
    delta = model.base_model.model[1].get_delta_weight("default").detach().numpy()
    np.testing.assert_allclose(delta, 0.5 * (b @ a).reshape(delta.shape), rtol=1e-4, atol=1e-6)
