"""Bare parameters of models that accelerate keeps elsewhere until a module runs: the outputs of the model at hand."""

import copy
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import Tensor, nn

import flora

from . import by_hand


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 6, 5)), nn.Parameter(torch.randn(3, 5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return sum(torch.tanh(x @ self.up[i].T) @ self.down[i].T for i in range(3))


class Net(nn.Module):
    _no_split_modules = ()  # PEFT asks for it

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Experts(), Experts(), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


CONFIG: dict[str, Any] = {"target_parameters": ["up", "down"], "r": 2, "init_weights": False}


def on_cpu(model: Any, folder: Any) -> None:
    accelerate.cpu_offload(model, execution_device="cpu")


def on_disk(model: Any, folder: Any) -> None:
    accelerate.disk_offload(model, folder, execution_device="cpu")


def mapped(model: Any, folder: Any) -> None:
    """One module in memory, one on disk, one on the device."""
    places = dict(zip(("first", "second", "head"), ("cpu", "disk", torch.device("cpu")), strict=True))
    places = {f"base_model.model.{name}": place for name, place in places.items()}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


ways = pytest.mark.parametrize("offload", [on_cpu, on_disk, mapped])


@pytest.fixture
def net() -> Net:
    return Net().requires_grad_(False).eval()


@torch.no_grad()
@ways
def test_outputs_are_those_of_the_model_at_hand(offload, net, tmp_path):
    model, x = peft.get_peft_model(copy.deepcopy(net), flora.FloraConfig(**CONFIG)).eval(), torch.randn(2, 5)
    expected = by_hand.run(net, model, x)
    names = set(model.state_dict())
    offload(model, tmp_path)
    assert model.base_model.model.second.get_parameter("up").is_meta
    for _ in range(2):
        torch.testing.assert_close(model(x), expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), net(x))
    assert set(model.state_dict()) == names
    assert not model.base_model.model.second.get_parameter("up").requires_grad
    accelerate.hooks.remove_hook_from_submodules(model)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.base_model.model.first.get_parameter("up"), net.first.up)


@torch.no_grad()
@ways
def test_merging_and_taking_it_back(offload, net, tmp_path):
    model, x = peft.get_peft_model(copy.deepcopy(net), flora.FloraConfig(**CONFIG)).eval(), torch.randn(2, 5)
    expected = by_hand.run(net, model, x)
    offload(model, tmp_path)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), net(x))
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


@torch.no_grad()
def test_an_adapter_loaded_onto_an_offloaded_model(net, tmp_path):
    model, x = peft.get_peft_model(copy.deepcopy(net), flora.FloraConfig(**CONFIG)).eval(), torch.randn(2, 5)
    expected = model(x)
    model.save_pretrained(tmp_path)
    accelerate.cpu_offload(net, execution_device="cpu")
    loaded = peft.PeftModel.from_pretrained(net, tmp_path).eval()
    torch.testing.assert_close(loaded(x), expected)
