"""Models that accelerate keeps elsewhere until a layer runs: the outputs of the model that is all at hand."""

import copy
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import flora
from flora.adapters import FloraLayer
from flora.methods.rivals.locon import LoconConfig
from flora.methods.rivals.lora_flat import LoraFlatConfig


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight / self.weight.norm(), self.bias)


class Net(nn.Module):
    _no_split_modules = ()  # PEFT asks for it

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.depthwise = nn.Conv1d(8, 8, 5, padding="same", groups=8)
        self.transposed = nn.ConvTranspose1d(8, 8, 3, padding=1)
        self.lstm = nn.LSTM(8, 7, batch_first=True)
        self.cell = nn.GRUCell(7, 7)
        self.own = OwnForward(7, 7)
        self.normed = parametrizations.weight_norm(nn.Linear(7, 7))
        self.fc = nn.Linear(7, 9)
        self.head = nn.Linear(9, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transposed(self.depthwise(torch.tanh(self.conv(self.embed(tokens).mT)))).mT
        x, _ = self.lstm(x)
        x = self.normed(self.own(self.cell(x.mean(1))))
        return self.head(torch.tanh(self.fc(x)))


class Attention(nn.Module):
    """By itself: accelerate cannot run one that it offloads, as its output projection is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(30, 6), nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.attention(x, x, x)[0]


TARGETS = [name for name, _ in Net().named_children() if name != "head"]
WITHOUT_NORM = [name for name in TARGETS if name != "normed"]
TOKENS = torch.randint(30, (4, 7), generator=torch.Generator().manual_seed(0))


def adapt(net: type[nn.Module] = Net, config: Any = flora.FloraConfig, **settings: Any) -> Any:
    torch.manual_seed(5)
    targets = TARGETS if net is Net else ["attention", "embed"]
    settings = {"target_modules": targets, "r": 3} | settings
    if config is flora.FloraConfig:
        settings = {"init_weights": False} | settings
    model = peft.get_peft_model(net().requires_grad_(False), config(**settings)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


def on_cpu(model: Any, folder: Any) -> None:
    accelerate.cpu_offload(model, execution_device="cpu")


def on_disk(model: Any, folder: Any) -> None:
    accelerate.disk_offload(model, folder, execution_device="cpu")


def mapped(model: Any, folder: Any) -> None:
    """Some layers on the device, some in memory, some on disk."""
    names = [f"base_model.model.{name}" for name, _ in model.base_model.model.named_children()]
    places = dict(zip(names, ["disk", "cpu", "meta"] * len(names), strict=False))
    places = {name: place if place != "meta" else torch.device("cpu") for name, place in places.items()}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


ways = pytest.mark.parametrize("offload", [on_cpu, on_disk, mapped])
FORMS: dict[str, dict[str, Any]] = {
    "auto": {},
    "factored": {"forward": "factored"},
    "merged": {"forward": "merged"},
    "magnitudes": {"use_dora": True},
    "folded": {"fold_pattern": {"fc": [3, 3, 7], "conv": [2, 4, 6, 3]}},
    "lora_flat": {"config": LoraFlatConfig, "target_modules": ["fc", "head"]},
    "dora_flat": {"config": LoraFlatConfig, "target_modules": ["fc", "head"], "use_dora": True},
    "locon": {"config": LoconConfig, "target_modules": ["fc", "conv", "depthwise"]},
}
every_form = pytest.mark.parametrize("form", FORMS)


@torch.no_grad()
@ways
@every_form
def test_outputs_are_those_of_the_model_at_hand(offload, form, tmp_path):
    model = adapt(**FORMS[form])
    names = set(model.state_dict())
    expected = model(TOKENS)
    with model.disable_adapter():
        base = model(TOKENS)
    assert (expected - base).abs().max() > 1e-3
    offload(model, tmp_path)
    if offload is not mapped:
        assert all(p.is_meta for n, p in model.named_parameters() if ".tucker_" in n)
    for _ in range(2):
        torch.testing.assert_close(model(TOKENS), expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(TOKENS), base)
    assert set(model.state_dict()) == names


@torch.no_grad()
@ways
@pytest.mark.parametrize("form", ["auto", "magnitudes"])
def test_attention(offload, form, tmp_path):
    model = adapt(Attention, **FORMS[form])
    expected = model(TOKENS)
    offload(model, tmp_path)
    for _ in range(2):
        torch.testing.assert_close(model(TOKENS), expected)


@torch.no_grad()
@ways
def test_several_adapters_and_switching(offload, tmp_path):
    model = adapt()
    model.add_adapter("second", flora.FloraConfig(target_modules=TARGETS, r=2, init_weights=False, scale=0.5))
    outputs = {}
    for active in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(active)
        outputs[tuple(active)] = model(TOKENS)
    offload(model, tmp_path)
    for active, expected in outputs.items():
        model.base_model.set_adapter(list(active))
        torch.testing.assert_close(model(TOKENS), expected)


@torch.no_grad()
@ways
@every_form
def test_merging_and_taking_it_back(offload, form, tmp_path):
    model = adapt(**({"target_modules": WITHOUT_NORM} | FORMS[form]))
    expected = model(TOKENS)
    with model.disable_adapter():
        base = model(TOKENS)
    offload(model, tmp_path)
    model.merge_adapter()
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    with model.disable_adapter():  # which takes it out in the forward pass
        torch.testing.assert_close(model(TOKENS), base, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(TOKENS), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("offload", [on_cpu, on_disk])
def test_merging_into_an_offloaded_parametrised_weight_is_refused(offload, tmp_path):
    model = adapt()
    expected = model(TOKENS)
    offload(model, tmp_path)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ValueError, match=r"^normed\.weight: a parametrised weight cannot .* offloaded; load the model"
        ):
            merge()
    torch.testing.assert_close(model(TOKENS), expected)


@torch.no_grad()
@ways
@pytest.mark.parametrize("form", ["auto", "magnitudes"])
def test_merging_layers_by_themselves(offload, form, tmp_path):
    model = adapt(**FORMS[form], target_modules=WITHOUT_NORM)
    expected = model(TOKENS)
    offload(model, tmp_path)
    layers = [module for module in model.modules() if isinstance(module, FloraLayer)]
    for layer in layers:
        layer.merge()
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-5)
    for layer in layers:
        layer.unmerge()
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-5)


@ways
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init": "hosvd"}], ids=["auto", "dora", "hosvd"])
def test_adapters_of_a_model_that_is_offloaded_already_train(offload, settings, tmp_path):
    torch.manual_seed(0)
    net = Net().requires_grad_(False)
    nets, models = (copy.deepcopy(net), net), []
    offload_net(offload, net, tmp_path)
    for own in nets:
        torch.manual_seed(1)
        models.append(peft.get_peft_model(own, flora.FloraConfig(target_modules=TARGETS, **settings)))
    for name, parameter in models[1].named_parameters():
        if parameter.requires_grad:
            assert not parameter.is_meta
            torch.testing.assert_close(parameter, models[0].get_parameter(name))
    for _ in range(2):
        losses = [model(TOKENS).square().mean() for model in models]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        for name, parameter in models[1].named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, models[0].get_parameter(name).grad)
        for model in models:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data -= 0.1 * parameter.grad
                    parameter.grad = None


def offload_net(offload: Any, net: nn.Module, folder: Any) -> None:
    if offload is not mapped:
        return offload(net, folder)
    names = [name for name, _ in net.named_children()]
    places = dict(zip(names, ["disk", "cpu", torch.device("cpu")] * len(names), strict=False))
    accelerate.dispatch_model(net, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@torch.no_grad()
def test_loading_onto_a_dispatched_model(tmp_path):
    torch.manual_seed(0)
    net = Net().requires_grad_(False).eval()
    model = peft.get_peft_model(
        copy.deepcopy(net), flora.FloraConfig(target_modules=TARGETS, r=3, init_weights=False)
    ).eval()
    expected = model(TOKENS)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    offload_net(mapped, net, tmp_path / "offloaded")
    loaded = peft.PeftModel.from_pretrained(net, tmp_path / "adapter", offload_folder=tmp_path / "again").eval()
    torch.testing.assert_close(loaded(TOKENS), expected)


def test_bare_parameters_of_an_offloaded_module():
    net = nn.Sequential(nn.Bilinear(3, 4, 5))
    config = flora.FloraConfig(target_modules=None, target_parameters=["0.weight"], init_weights=False)
    model, inputs = peft.get_peft_model(net, config), (torch.randn(2, 3), torch.randn(2, 4))
    layer = model.base_model.model[0]
    delta = layer.adapted_parameters.get_delta_weight("default").detach()
    expected = torch.einsum("bi,oij,bj->bo", inputs[0], net[0]._parameters["weight"] + delta, inputs[1])
    expected += net[0]._parameters["bias"]
    accelerate.cpu_offload(net, execution_device="cpu")
    assert net[0]._parameters["weight"].is_meta
    torch.testing.assert_close(layer(*inputs), expected)
