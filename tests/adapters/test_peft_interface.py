"""What PEFT offers around its adapters, for ours: names, deletion, failed additions, heads, casting, optimisers."""

import copy
from typing import Any

import peft
import pytest
import torch
from peft.functional import delete_adapter
from peft.helpers import disable_input_dtype_casting
from peft.optimizers import create_loraplus_optimizer
from peft.optimizers.lorafa import create_lorafa_optimizer
from peft.optimizers.riemannian import create_riemannian_optimizer
from torch import Tensor, nn

import flora
from flora.methods.rivals.bottleneck import BottleneckConfig


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.gru = nn.GRU(6, 4, batch_first=True)
        self.fc = nn.Linear(4, 5)
        self.head = nn.Linear(5, 5)
        self.tail = nn.Linear(5, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.gru(self.conv(self.embed(tokens).mT).mT)
        return self.tail(torch.tanh(self.head(torch.tanh(self.fc(x)))))


@pytest.fixture
def net() -> Net:
    return Net().eval()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(20, (2, 4))


def config(**settings: Any) -> flora.FloraConfig:
    return flora.FloraConfig(**{"r": 2, "init_weights": False, "target_modules": ["conv", "fc"], **settings})


def outputs(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """The output under each adapter, after its parameters are drawn anew."""
    results = {}
    for name in model.peft_config:
        model.set_adapter(name)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter))
    for name in model.peft_config:
        model.set_adapter(name)
        results[name] = model(tokens)
    return results


# ---------------------------------------------------------------------- names


NAMES = ["a", "ab", "default_1", "core", "weight", "weight_0", "tucker_core", "t", "fc", "conv", "model", "base_layer"]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_an_adapter_may_be_called_like_a_part_of_another_or_of_the_model(name, net, tokens, tmp_path):
    model = peft.get_peft_model(copy.deepcopy(net), config(modules_to_save=["head"])).eval()
    model.add_adapter(name, config(target_modules=["fc", "gru"], modules_to_save=["head", "tail"]))
    expected = outputs(model, tokens)
    assert (expected["default"] - expected[name]).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    folders = {"default": tmp_path, name: tmp_path / name}
    for order in (["default", name], [name, "default"]):
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(net), folders[order[0]], adapter_name=order[0]).eval()
        loaded.load_adapter(folders[order[1]], order[1])
        for adapter in order:
            loaded.set_adapter(adapter)
            torch.testing.assert_close(loaded(tokens), expected[adapter], rtol=0, atol=0)
    model.delete_adapter(name)
    model.set_adapter("default")
    torch.testing.assert_close(model(tokens), expected["default"], rtol=0, atol=0)
    layers = [layer for layer in model.modules() if isinstance(layer, flora.FloraLayer)]
    assert len(layers) == 3
    assert not any(name in layer._all_available_adapter_names() for layer in layers)


@pytest.mark.parametrize("name", ["", "a.b", "keys", "type", "forward"])
def test_names_that_torch_cannot_keep_are_one_clear_line(name, net, tokens):
    with pytest.raises(ValueError, match=f"^adapter_name: '{name}' cannot name an adapter"):
        peft.get_peft_model(net, config(), adapter_name=name)
    model = peft.get_peft_model(net, config()).eval()
    before = model(tokens)
    with pytest.raises(ValueError, match=f"^adapter_name: '{name}' cannot name an adapter"):
        model.add_adapter(name, config())
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=0)
    assert list(model.peft_config) == ["default"]


# ---------------------------------------------------------------------- adding and deleting


FAILING: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"target_modules": ["nothing"]}, ValueError, "not found in the base model"),
    ({"target_modules": [], "target_parameters": ["nothing"]}, ValueError, ""),
    ({"target_modules": ["conv", "fc", "act"]}, ValueError, "act is a Tanh"),
    ({"target_modules": ["conv", "tail"], "rank_pattern": {"tail": [2, 3, 4]}}, ValueError, "rank_pattern"),
    ({"target_modules": ["conv", "gru"], "flora_dropout": 0.5}, ValueError, "flora_dropout: gru"),
]


@pytest.mark.parametrize(("settings", "error", "message"), FAILING)
@torch.no_grad()
def test_a_second_adapter_that_fails_leaves_the_first_as_it_was(settings, error, message, net, tokens):
    net.act = nn.Tanh()
    model = peft.get_peft_model(net, config(modules_to_save=["head"])).eval()
    before, keys = model(tokens), list(model.state_dict())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with pytest.raises(error, match=message):
        model.add_adapter("other", config(**settings))
    assert list(model.peft_config) == ["default"] == model.active_adapters == list(model.base_model.peft_config)
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=0)
    assert list(model.state_dict()) == keys
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    model.add_adapter("other", config(target_modules=["conv", "tail"]))
    model.set_adapter("other")
    assert (model(tokens) - before).abs().max() > 1e-3


@pytest.mark.parametrize(("settings", "error", "message"), FAILING)
def test_a_first_adapter_that_fails_leaves_the_model_as_it_was(settings, error, message, net, tokens):
    net.act = nn.Tanh()
    before, modules = net(tokens), [(name, type(module)) for name, module in net.named_modules()]
    with pytest.raises(error, match=message):
        peft.get_peft_model(net, config(**settings))
    assert [(name, type(module)) for name, module in net.named_modules()] == modules
    torch.testing.assert_close(net(tokens), before, rtol=0, atol=0)


@torch.no_grad()
def test_a_merged_adapter_is_not_deleted(net, tokens):
    model = peft.get_peft_model(net, config()).eval()
    model.add_adapter("other", config())
    before = model(tokens)
    model.merge_adapter()
    with pytest.raises(ValueError, match="default"):
        model.delete_adapter("default")
    with pytest.raises(ValueError, match=r"^default: merged adapters cannot be deleted; unmerge first"):
        delete_adapter(model.base_model.model, "default", prefix="tucker_")
    torch.testing.assert_close(model(tokens), before)
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert list(model.peft_config) == ["other"]


# ---------------------------------------------------------------------- heads that differ between adapters


HEADS: dict[str, list[str] | None] = {"a": ["head"], "b": None, "c": ["tail"], "d": ["head", "tail"]}


@pytest.mark.parametrize("order", ["abcd", "dcba", "bdac", "cadb"])
@torch.no_grad()
def test_adapters_with_other_heads_are_loaded_in_any_order(order, net, tokens, tmp_path):
    expected = {}
    for name, heads in HEADS.items():
        model = peft.get_peft_model(copy.deepcopy(net), config(modules_to_save=heads), adapter_name=name).eval()
        expected.update(outputs(model, tokens))
        model.save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / order[0], adapter_name=order[0]).eval()
    for name in order[1:]:
        model.load_adapter(tmp_path / name, name)
    for name in [*order, *reversed(order)]:
        model.set_adapter(name)
        torch.testing.assert_close(model(tokens), expected[name])
    model.set_adapter(order[-1])
    for name in order[:-1]:
        model.delete_adapter(name)
    torch.testing.assert_close(model(tokens), expected[order[-1]])


# ---------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("form", ["factored", "merged"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_output_has_the_dtype_of_the_base(dtype, form, autocast, net, tokens):
    base = net.to(dtype)
    settings = config(target_modules=["embed", "conv", "gru", "fc"], forward=form, scale=0.3)
    model = peft.get_peft_model(copy.deepcopy(base), settings, autocast_adapter_dtype=autocast).eval()
    kept = {parameter.dtype for name, parameter in model.named_parameters() if "tucker_" in name}
    assert kept == {torch.float32 if autocast else dtype}
    output = model(tokens)
    assert output.dtype == base(tokens).dtype == dtype
    exact = copy.deepcopy(base).double()
    for name, layer, weight in model.base_model.adapted_weights("default"):
        owner = exact.get_submodule(name.rpartition(".")[0])
        getattr(owner, weight).add_(layer.double().get_delta_weight("default", weight))
    torch.testing.assert_close(output.double(), exact(tokens), rtol=0.03, atol=0.03)
    with disable_input_dtype_casting(model):
        assert model.to(dtype)(tokens).dtype == dtype


@torch.no_grad()
def test_input_casting_is_switched_on_layers_of_every_method(net, tokens):
    for settings in (config(), BottleneckConfig(target_modules=["head"])):
        model = peft.get_peft_model(copy.deepcopy(net), settings).eval()
        before = model(tokens)
        with disable_input_dtype_casting(model):
            torch.testing.assert_close(model(tokens), before, rtol=0, atol=0)


# ---------------------------------------------------------------------- optimisers that know LoRA's parameters by name


@pytest.mark.parametrize("method", ["flora", "rival"])
def test_optimisers_for_loras_two_matrices_refuse(method, net):
    from flora.methods.rivals.lotr import LotrConfig

    settings = config() if method == "flora" else LotrConfig(r=2, target_modules=["fc", "head"])
    model: Any = peft.get_peft_model(net, settings)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with pytest.raises(ValueError, match=r"^create_loraplus_optimizer: only LoRA has the matrices A and B"):
        create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    with pytest.raises(ValueError, match=r"^create_lorafa_optimizer: only LoRA has the matrix A"):
        create_lorafa_optimizer(model, r=2, lora_alpha=4, lr=1e-3)
    with pytest.raises(ValueError, match="did not find any trainable lora_A/lora_B"):
        create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-3)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained


def test_optimisers_of_lora_still_work(net):
    model: Any = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["fc", "head"]))
    plus = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    assert sorted({group["lr"] for group in plus.param_groups if group["params"]}) == [1e-3, 16e-3]
    frozen = create_lorafa_optimizer(model, r=2, lora_alpha=4, lr=1e-3)
    model(torch.randint(20, (2, 4))).sum().backward()
    frozen.step()
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_A" in name)
