"""layers_to_transform counts layers, wherever they stand in the model and whatever else in it is numbered."""

from typing import Any

import peft
import pytest
from torch import nn

import flora


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(4, 4)}) for _ in range(3))
        self.fc = nn.Linear(4, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Net()


EXPERTS = [f"layers.3.experts.{index}.w1" for index in range(3)]


@pytest.mark.parametrize("pattern", [None, "layers", ["blocks", "layers"]])
@pytest.mark.parametrize(("kind", "prefix"), [(Net, ""), (Wrapped, "model.")])
@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([3], [*EXPERTS, "layers.3.fc"]),
        (3, [*EXPERTS, "layers.3.fc"]),
        ([0, 3], [*(f"layers.0.experts.{index}.w1" for index in range(3)), "layers.0.fc", *EXPERTS, "layers.3.fc"]),
    ],
)
def test_an_experts_index_is_not_taken_for_its_layers(kind, prefix, pattern, layers, expected):
    settings: Any = {"target_modules": ["w1", "fc"], "layers_to_transform": layers, "layers_pattern": pattern}
    model = peft.get_peft_model(kind(), flora.FloraConfig(r=2, **settings))
    adapted = [name for name, module in model.base_model.model.named_modules() if isinstance(module, flora.FloraLayer)]
    assert adapted == [prefix + name for name in expected]


def test_full_names_exclusions_and_trained_heads_are_as_before():
    settings: Any = {"target_modules": ["w1", "layers.0.fc"], "layers_to_transform": [3]}
    config = flora.FloraConfig(r=2, exclude_modules=["layers.3.experts.1.w1"], **settings)
    model = peft.get_peft_model(Net(), config)
    adapted = [name for name, module in model.base_model.model.named_modules() if isinstance(module, flora.FloraLayer)]
    assert adapted == ["layers.0.fc", "layers.3.experts.0.w1", "layers.3.experts.2.w1"]


def test_experts_are_counted_where_asked_for():
    settings: Any = {"target_modules": ["w1"], "layers_to_transform": [2], "layers_pattern": "experts"}
    model = peft.get_peft_model(Net(), flora.FloraConfig(r=2, **settings))
    adapted = [name for name, module in model.base_model.model.named_modules() if isinstance(module, flora.FloraLayer)]
    assert adapted == [f"layers.{index}.experts.2.w1" for index in range(4)]
