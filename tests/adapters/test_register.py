"""FLoRA among PEFT's methods."""

import copy
import json

import peft

import flora
from flora.adapters.config import FLORA
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
