"""FLoRA among PEFT's methods."""

import copy
import json
import subprocess
import sys

import peft
import pytest

import flora
from flora.adapters.config import FLORA
from flora.adapters.register import register
from flora.replaced.config import PeftMethod


def test_peft_finds_the_method_by_its_name():
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["FLORA"] is flora.FloraConfig
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING["FLORA"] is flora.FloraModel
    assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING["FLORA"] == "tucker_"
    assert isinstance(peft.get_peft_config({"peft_type": "FLORA", "r": 3}), flora.FloraConfig)


def test_pefts_enum_is_left_alone():
    assert "FLORA" not in [method.value for method in peft.PeftType]
    prefixes = peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING
    assert not any("tucker_" in prefixes[method] for method in peft.PeftType if method in prefixes)


def test_the_name_acts_like_one_of_the_enum():
    assert (FLORA, FLORA.value, FLORA.name, f"{FLORA}") == ("FLORA",) * 4
    assert str(FLORA) == "PeftType.FLORA"
    assert json.dumps(FLORA) == '"FLORA"'
    assert copy.deepcopy(FLORA) == "FLORA"
    assert hash(FLORA) == hash("FLORA")
    assert isinstance(FLORA, PeftMethod)


@pytest.mark.parametrize("version", ["0.20.0", "0.22.0", "1.0"])
def test_other_versions_of_peft_are_refused(version, monkeypatch):
    monkeypatch.setattr(peft, "__version__", version)
    with pytest.raises(ImportError, match=rf"flora needs peft>=0.21,<0.22, found {version}"):
        register(flora.FloraConfig, flora.FloraModel)


@pytest.mark.parametrize("version", ["0.21.0", "0.21.9", "0.21.3.dev0"])
def test_the_whole_series_is_accepted(version, monkeypatch):
    monkeypatch.setattr(peft, "__version__", version)
    register(flora.FloraConfig, flora.FloraModel)


def test_importing_flora_registers_everything_and_is_light():
    code = (
        "import sys, flora; from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known; "
        "print([m for m in ('FLORA', 'LORA_FLAT', 'LOTR', 'LOCON_TUCKER', 'VPT', 'BOTTLENECK') if m not in known], "
        "[m for m in ('hydra', 'wandb', 'timm', 'datasets', 'lycoris') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"
