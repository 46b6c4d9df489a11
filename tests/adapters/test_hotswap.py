"""Swapping an adapter for another in place: afterwards the model is as if the other had been loaded anew."""

import copy
from typing import Any

import peft
import pytest
import torch
from peft.utils import hotswap
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor, nn

import flora


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.grouped = nn.Conv1d(6, 6, 3, padding=1, groups=3)
        self.fc = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc(torch.tanh(self.grouped(torch.tanh(self.conv(x)))).mT)))


FIRST: dict[str, Any] = {"r": 3, "kernel_rank": 2, "target_modules": ["conv", "grouped", "fc"], "init_weights": False}
OTHERS: dict[str, dict[str, Any]] = {
    "alike": {},
    "ranks": {"r": 5, "kernel_rank": 3, "rank_pattern": {"fc": 2}},
    "smaller": {"r": 1},
    "scale": {"scale": 4.0, "scale_pattern": {"fc": 0.3}},
    "alpha": {"alpha": 12, "alpha_pattern": {"conv": 5}, "rank_stabilized": True},
    "fold": {"fold_pattern": {"fc": [2, 4, 6]}},
    "magnitudes": {"use_dora": True},
    "form": {"forward": "factored"},
    "fewer layers": {"target_modules": ["conv"]},
}


@pytest.fixture
def net() -> Net:
    return Net().double().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 5, dtype=torch.double)


def adapt(net: nn.Module, **settings: Any) -> Any:
    model = peft.get_peft_model(copy.deepcopy(net), flora.FloraConfig(**{**FIRST, **settings})).eval()
    for name, parameter in model.named_parameters():
        if "tucker_magnitude" in name:
            parameter.data.mul_(1.5)
    return model


def saved(net: nn.Module, folder: Any, **settings: Any) -> str:
    adapt(net, **settings).save_pretrained(str(folder))
    return str(folder)


@pytest.mark.parametrize("settings", OTHERS.values(), ids=OTHERS.keys())
@torch.no_grad()
def test_a_swapped_adapter_gives_what_it_gives_loaded_anew(settings, net, x, tmp_path):
    folder = saved(net, tmp_path / "other", **settings)
    expected = peft.PeftModel.from_pretrained(copy.deepcopy(net), folder)(x)
    model = adapt(net, **(OTHERS["magnitudes"] if "r" in settings else {}))
    before = model(x)
    hotswap_adapter(model, folder, "default", torch_device="cpu")
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert (expected - before).abs().max() > 1e-4
    model.save_pretrained(str(tmp_path / "again"))
    again = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path / "again"))
    torch.testing.assert_close(again(x), expected, rtol=0, atol=0)


@torch.no_grad()
def test_swapping_there_and_back_and_with_another_adapter_beside_it(net, x, tmp_path):
    first, second = saved(net, tmp_path / "1"), saved(net, tmp_path / "2", target_modules=["fc"], r=5)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(net), first, adapter_name="a")
    model.load_adapter(second, "ab")
    outputs = {}
    for name in ("a", "ab"):
        model.set_adapter(name)
        outputs[name] = model(x)
    model.set_adapter("a")
    hotswap_adapter(model, second, "a", torch_device="cpu")
    torch.testing.assert_close(model(x), outputs["ab"], rtol=0, atol=0)
    hotswap_adapter(model, first, "a", torch_device="cpu")
    torch.testing.assert_close(model(x), outputs["a"], rtol=0, atol=0)
    model.set_adapter("ab")
    torch.testing.assert_close(model(x), outputs["ab"], rtol=0, atol=0)


@torch.no_grad()
def test_tensors_of_the_same_shape_stay_where_they_are(net, tmp_path):
    model = adapt(net)
    before = {name: value.data_ptr() for name, value in model.named_parameters()}
    hotswap_adapter(model, saved(net, tmp_path, scale=2.0), "default", torch_device="cpu")
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == before


@torch.no_grad()
def test_a_compiled_model_takes_over_what_is_swapped_in(net, x, tmp_path):
    folder = saved(net, tmp_path, r=5, scale=3.0)
    expected = peft.PeftModel.from_pretrained(copy.deepcopy(net), folder)(x)
    model = torch.compile(adapt(net), backend="eager")
    before = model(x)
    hotswap_adapter(model, folder, "default", torch_device="cpu")
    torch.testing.assert_close(model(x), expected)
    assert (before - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("first", "second", "error", "message"),
    [
        ({"target_modules": ["fc"]}, {}, RuntimeError, "hotswap: the model's default adapts no"),
        ({"modules_to_save": ["head"]}, {}, ValueError, "hotswap: adapters with modules_to_save cannot be swapped"),
        ({}, {"modules_to_save": ["head"]}, ValueError, "hotswap: adapters with modules_to_save cannot be swapped"),
        ({"bias": "all"}, {}, ValueError, "hotswap: adapters that train biases cannot be swapped"),
    ],
)
@torch.no_grad()
def test_what_cannot_be_swapped_is_refused_and_changes_nothing(first, second, error, message, net, x, tmp_path):
    folder, model = saved(net, tmp_path, **second), adapt(net, **first)
    before = model(x)
    with pytest.raises(error, match=f"^{message}"):
        hotswap_adapter(model, folder, "default", torch_device="cpu")
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


@torch.no_grad()
def test_a_merged_adapter_and_a_wrong_configuration_are_refused(net, x):
    model, other = adapt(net), adapt(net)
    state = {k: v.clone() for k, v in other.state_dict().items() if "tucker_" in k}
    before = model(x)
    wrong = flora.FloraConfig(**{**FIRST, "rank_pattern": {"fc": 1}})
    with pytest.raises(
        RuntimeError, match=r"fc\.tucker_core\.default\.weight is \[3, 3\]; its configuration says \[1, 1\]"
    ):
        hotswap.hotswap_adapter_from_state_dict(model, state, "default", wrong)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    model.merge_adapter()
    with pytest.raises(ValueError, match="hotswap: default is merged"):
        hotswap.hotswap_adapter_from_state_dict(model, state, "default", model.peft_config["default"])
    with pytest.raises(ValueError, match="prepare_model_for_compiled_hotswap: FLoRA needs no preparation"):
        prepare_model_for_compiled_hotswap(model, target_rank=8)


@torch.no_grad()
def test_lora_is_swapped_as_before(net, x, tmp_path):
    lora = {"target_modules": ["fc"], "init_lora_weights": False}
    peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(r=2, **lora)).save_pretrained(str(tmp_path))
    expected = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path))(x)
    model = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(r=4, **lora)).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    torch.testing.assert_close(model(x), expected)
