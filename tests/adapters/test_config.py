"""Configurations: bad values are rejected in one line that starts with the field's name."""

import json

import peft
import pytest

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
]


@pytest.mark.parametrize(("field", "settings"), BAD)
def test_bad_values_name_their_field(field, settings):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        flora.FloraConfig(**settings)
    assert str(caught.value).startswith(f"{field}: ")
    assert "\n" not in str(caught.value)


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
    own = set(flora.FloraConfig.__annotations__)
    fields = {name: field for name, field in flora.FloraConfig.__dataclass_fields__.items() if name in own}
    assert fields
    assert all(len(field.metadata.get("help", "")) > 20 for field in fields.values())
