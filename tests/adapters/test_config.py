"""Configurations: bad values are rejected in one line that starts with the field's name."""

import dataclasses
import json

import numpy as np
import peft
import pytest
from omegaconf import OmegaConf

import flora

BAD = [
    ("r", {"r": 0}),
    ("r", {"r": -3}),
    ("r", {"r": 2.5}),
    ("r", {"r": True}),
    ("r", {"r": []}),
    ("r", {"r": [4, 0]}),
    ("kernel_rank", {"kernel_rank": 0}),
    ("stack_rank", {"stack_rank": -1}),
    ("stack_rank", {"stack_rank": [1, 2]}),
    ("rank_pattern['fc']", {"rank_pattern": {"fc": 0}}),
    ("rank_pattern['(']", {"rank_pattern": {"(": 2}}),
    ("scale", {"scale": "4"}),
    ("scale", {"scale": float("nan")}),
    ("scale", {"scale": 1.0, "alpha": 16}),
    ("scale", {"alpha": 16, "scale_pattern": {"fc": 1.0}}),
    ("scale_pattern['fc']", {"scale_pattern": {"fc": "x"}}),
    ("alpha", {"alpha": float("inf")}),
    ("alpha_pattern", {"alpha_pattern": {"fc": 8}}),
    ("rank_stabilized", {"rank_stabilized": True}),
    ("init", {"init": "gaussian"}),
    ("forward", {"forward": "fast"}),
    ("forward", {"forward": "factored", "use_dora": True}),
    ("clip_ranks", {"clip_ranks": "all"}),
    ("bias", {"bias": "lora_only"}),
    ("flora_dropout", {"flora_dropout": 1.0}),
    ("flora_dropout", {"flora_dropout": -0.1}),
    ("flora_dropout", {"flora_dropout": 0.1, "use_dora": True}),
    ("fold_pattern['qkv']", {"fold_pattern": {"qkv": [3, -1, -1]}}),
    ("fold_pattern['qkv']", {"fold_pattern": {"qkv": [6]}}),
    ("fold_pattern['qkv']", {"fold_pattern": {"qkv": [3, 0, 4]}}),
    ("layers_pattern", {"layers_pattern": "h"}),
    ("layers_to_transform", {"layers_to_transform": [1], "target_modules": ".*"}),
    ("r", {"r": "8"}),
    ("r", {"r": None}),
    ("r", {"r": {4, 8}}),
    ("kernel_rank", {"kernel_rank": 1.5}),
    ("stack_rank", {"stack_rank": True}),
    ("stack_modes", {"stack_modes": 7}),
    ("stack_modes", {"stack_modes": {"qkv": 0}}),
    ("stack_modes", {"stack_modes": {0: [0]}}),
    ("rank_pattern", {"rank_pattern": [1]}),
    ("rank_pattern", {"rank_pattern": 0}),
    ("rank_pattern", {"rank_pattern": {5: 2}}),
    ("rank_pattern['fc']", {"rank_pattern": {"fc": "2"}}),
    ("fold_pattern", {"fold_pattern": "qkv"}),
    ("fold_pattern['qkv']", {"fold_pattern": {"qkv": 3}}),
    ("fold_pattern['qkv']", {"fold_pattern": {"qkv": [3, True, 4]}}),
    ("scale", {"scale": True}),
    ("scale_pattern", {"scale_pattern": 2.0}),
    ("alpha", {"alpha": [8]}),
    ("alpha_pattern", {"alpha": 8, "alpha_pattern": ["fc"]}),
    ("alpha_pattern['fc']", {"alpha": 8, "alpha_pattern": {"fc": [4]}}),
    ("rank_stabilized", {"alpha": 8, "rank_stabilized": "yes"}),
    ("scale", {"scale": 0}),
    ("scale", {"scale": 0.0, "scale_pattern": {"fc": 0}}),
    ("alpha", {"alpha": 0}),
    ("init", {"init": None}),
    ("init_weights", {"init_weights": "no"}),
    ("use_dora", {"use_dora": 1}),
    ("flora_dropout", {"flora_dropout": "0.1"}),
    ("target_modules", {"target_modules": 5}),
    ("target_modules", {"target_modules": ["fc", 5]}),
    ("exclude_modules", {"exclude_modules": {"fc": 1}}),
    ("target_parameters", {"target_parameters": "experts"}),
    ("modules_to_save", {"modules_to_save": 3}),
    ("modules_to_save", {"modules_to_save": "head"}),
    ("layers_pattern", {"layers_to_transform": 1, "layers_pattern": 4}),
    ("layers_to_transform", {"layers_to_transform": "1"}),
    ("layers_to_transform", {"layers_to_transform": [True]}),
]


@pytest.mark.parametrize(("field", "settings"), BAD)
def test_bad_values_name_their_field(field, settings):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        flora.FloraConfig(**settings)
    assert str(caught.value).startswith(f"{field}: ")
    assert "\n" not in str(caught.value)


def test_a_scale_of_zero_may_leave_layers_out():
    assert flora.FloraConfig(scale=0, scale_pattern={"fc": 2}).scale == 0
    assert flora.FloraConfig(alpha=8, alpha_pattern={"fc": 0}).alpha == 8
    assert flora.FloraConfig(scale=0, use_dora=True).use_dora


def test_numbers_and_lists_of_other_libraries_become_plain_ones_that_can_be_saved(tmp_path):
    hydra = OmegaConf.create({"names": ["a", "b"], "ranks": {"fc": [2, 3]}})
    config = flora.FloraConfig(
        r=np.int64(4),
        kernel_rank=np.array([3, 1]),
        rank_pattern=hydra.ranks,
        scale_pattern={"fc": np.float32(0.5)},
        use_dora=np.True_,
        target_modules=hydra.names,
        target_parameters=("c", "d"),
        modules_to_save={"head"},
    )
    plain = flora.FloraConfig(
        r=4,
        kernel_rank=[3, 1],
        rank_pattern={"fc": [2, 3]},
        scale_pattern={"fc": 0.5},
        use_dora=True,
        target_modules={"a", "b"},
        target_parameters=["c", "d"],
        modules_to_save=["head"],
    )
    assert config == plain
    config.save_pretrained(str(tmp_path))
    assert peft.PeftConfig.from_pretrained(str(tmp_path)) == plain


def test_a_saved_configuration_is_the_same_when_loaded(tmp_path):
    config = flora.FloraConfig(
        r=[4, 3],
        kernel_rank=3,
        rank_pattern={"fc": [2, 2]},
        alpha=8,
        alpha_pattern={"fc": 2},
        rank_stabilized=True,
        init="paper",
        fold_pattern={"qkv": [3, -1, 8]},
        stack_modes={"qkv": [0]},
        target_modules=["b", "a"],
        exclude_modules=["d", "c"],
        bias="flora_only",
        use_dora=True,
    )
    config.save_pretrained(str(tmp_path))
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["target_modules"] == ["a", "b"]
    assert stored["exclude_modules"] == ["c", "d"]
    assert peft.PeftConfig.from_pretrained(str(tmp_path)) == config


def test_every_field_is_documented():
    inherited = {field.name for field in dataclasses.fields(peft.PeftConfig)}
    own = [field for field in dataclasses.fields(flora.FloraConfig) if field.name not in inherited]
    fields = {field.name: field for field in own}
    assert fields
    assert all(len(field.metadata.get("help", "")) > 20 for field in fields.values())
