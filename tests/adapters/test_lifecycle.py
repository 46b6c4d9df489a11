"""What happens to adapters after they are made: saved, loaded, merged, combined, switched, deleted, compiled."""

import copy
import json
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import flora
from flora.adapters import FloraLayer

from .layer_cases import Holder


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 6, 6))
        self.embed = nn.Embedding(30, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.depthwise = nn.Conv1d(8, 8, 5, padding="same", groups=8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 7, batch_first=True)
        self.fc = nn.Linear(7, 9)
        self.head = nn.Linear(9, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) @ self.table.mean(0)
        x = self.depthwise(torch.tanh(self.conv(x.mT))).mT
        x, _ = self.attention(x, x, x)
        x, _ = self.lstm(x)
        return self.head(torch.tanh(self.fc(x)).mean(1))


TARGETS = ["attention", "conv", "depthwise", "embed", "fc", "lstm"]
SETTINGS: dict[str, Any] = {"target_modules": TARGETS, "target_parameters": ["table"], "r": 3, "init_weights": False}


@pytest.fixture(autouse=True)
def _without_gradients():
    """Torch's own recurrent and attention kernels round differently where gradients are recorded."""
    with torch.no_grad():
        yield


@pytest.fixture
def net() -> Net:
    return Net().eval().requires_grad_(False)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(30, (4, 7))


def adapt(net: nn.Module, name: str = "default", **settings) -> peft.PeftModel:
    return peft.get_peft_model(copy.deepcopy(net), flora.FloraConfig(**{**SETTINGS, **settings}), name).eval()


def layers(model: nn.Module) -> list[FloraLayer]:
    return [module for module in model.modules() if isinstance(module, FloraLayer)]


# ---------------------------------------------------------------------- saving and loading


def test_saved_adapter_is_small_sorted_and_reproduces_the_output(net, tokens, tmp_path):
    model = adapt(net, modules_to_save=["head"])
    model.base_model.model.head.modules_to_save["default"].bias.data.add_(1)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == TARGETS
    assert config["peft_type"] == "FLORA"
    stored = load_file(tmp_path / "adapter_model.safetensors")
    expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(value.numel() for value in stored.values()) == expected
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path)
    assert torch.equal(loaded(tokens), model(tokens))


def test_loading_without_initialising_first(net, tokens, tmp_path):
    model = adapt(net)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path, low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert torch.equal(loaded(tokens), model(tokens))


def test_wrapping_on_the_meta_device_allocates_nothing():
    with torch.device("meta"):
        model = peft.get_peft_model(Net(), flora.FloraConfig(target_modules=TARGETS, init="hosvd"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.base_model.effective_ranks()["depthwise"] == [2, 1, 2]


def test_pickle_checkpoints_are_refused(net, tmp_path):
    adapt(net).save_pretrained(tmp_path, safe_serialization=False, save_embedding_layers=False)
    with pytest.raises(ValueError, match=r"adapter_model.bin: pickle checkpoints are refused"):
        peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path)


def test_an_adapter_of_another_architecture_is_refused(net, tmp_path):
    adapt(net, target_parameters=None).save_pretrained(tmp_path, save_embedding_layers=False)
    wider = copy.deepcopy(net)
    wider.fc = nn.Linear(7, 11)
    with pytest.raises(ValueError, match=r"does not fit the model: .*fc.* is \[9, 3\] in the file, \[11, 3\]"):
        peft.PeftModel.from_pretrained(wider, tmp_path)
    shorter = copy.deepcopy(net)
    shorter.conv = nn.Identity()
    with pytest.raises(ValueError, match="conv is a Identity, which is not supported"):
        peft.PeftModel.from_pretrained(shorter, tmp_path)
    with pytest.raises(ValueError, match="not found in the base model"):
        peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(2, 2)), tmp_path)


def test_models_can_be_copied(net, tokens):
    model = adapt(net)
    duplicate = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(duplicate(tokens), copy.deepcopy(duplicate)(tokens))
    assert duplicate(tokens).abs().max() > 0


# ---------------------------------------------------------------------- merging


def test_merging_costs_nothing_in_accuracy_and_leaves_a_plain_model(net, tokens):
    model = adapt(net)
    expected = model(tokens)
    merged = model.merge_and_unload()
    assert (merged(tokens) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert [(n, type(m)) for n, m in merged.named_modules()] == [(n, type(m)) for n, m in net.named_modules()]
    assert merged.state_dict().keys() == net.state_dict().keys()


def test_unloading_restores_the_base_model(net, tokens):
    expected = net(tokens)
    plain = adapt(net).unload()
    assert torch.equal(plain(tokens), expected)
    assert not plain._forward_hooks


def test_broken_adapters_are_not_merged(net):
    model = adapt(net)
    before = copy.deepcopy(net.fc.weight)
    model.base_model.model.fc.core("default").data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        model.base_model.model.fc.merge(safe_merge=True)
    assert torch.equal(model.base_model.model.fc.base_layer.weight, before)


class Quantised(nn.Linear):
    """Stands in for an 8-bit layer: integer weight, its own forward."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features)
        self.scale = linear.weight.abs().max() / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


def test_quantised_linear_layers_are_adapted_but_not_merged():
    model = peft.get_peft_model(
        Holder(Quantised(nn.Linear(6, 5))), flora.FloraConfig(target_modules=["layer"], init_weights=False)
    )
    x = torch.randn(3, 6)
    layer = model.base_model.model.layer
    expected = layer.base_layer(x) + x @ layer.get_delta_weight("default").T
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match=r"weight: a quantised .*torch.int8.* cannot be merged"):
        model.merge_adapter()
    attention = nn.MultiheadAttention(4, 2)
    attention.in_proj_weight = nn.Parameter(attention.in_proj_weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="layer: a quantised MultiheadAttention cannot be adapted"):
        peft.get_peft_model(Holder(attention), flora.FloraConfig(target_modules=["layer"]))
    with pytest.raises(ValueError, match="init: hosvd needs a floating-point weight"):
        peft.get_peft_model(
            Holder(Quantised(nn.Linear(6, 5))), flora.FloraConfig(target_modules=["layer"], init="hosvd")
        )


def test_sharded_weights_are_not_merged(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = peft.get_peft_model(Holder(nn.Linear(6, 4)), flora.FloraConfig(target_modules=["layer"]))
        layer = model.base_model.model.layer
        sharded = torch.distributed.tensor.distribute_tensor(layer.base_layer.weight.data, mesh)
        layer.base_layer.weight = nn.Parameter(sharded, requires_grad=False)
        with pytest.raises(ValueError, match=r"weight: a sharded weight \(DTensor\) cannot be merged"):
            model.merge_and_unload()
    finally:
        torch.distributed.destroy_process_group()


def test_weight_normalised_layers_are_merged_through_their_normalisation():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3, groups=2))
    model = peft.get_peft_model(Holder(conv), flora.FloraConfig(target_modules=["layer"], init_weights=False)).eval()
    x = torch.randn(2, 4, 9)
    expected = model(x)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)
    assert nn.utils.parametrize.is_parametrized(merged.layer, "weight")


# ---------------------------------------------------------------------- several adapters


@pytest.fixture
def pair(net) -> peft.PeftModel:
    model = adapt(net, "first")
    model.add_adapter("second", flora.FloraConfig(**{**SETTINGS, "r": 2, "kernel_rank": 1, "scale": 0.5}))
    return model.eval()


def activate(model: peft.PeftModel, *names: str) -> None:
    model.base_model.set_adapter(list(names))


def updates(model: peft.PeftModel, adapter: str) -> dict[str, Tensor]:
    named = model.base_model.adapted_weights(adapter)
    return {name: layer.get_delta_weight(adapter, weight).detach() for name, layer, weight in named}


def test_active_adapters_add_up(pair, net, tokens):
    activate(pair, "first", "second")
    first, second = updates(pair, "first"), updates(pair, "second")
    expected = copy.deepcopy(net)
    for name in first:
        expected.get_parameter(name).data += first[name] + second[name]
    torch.testing.assert_close(pair(tokens), expected(tokens), rtol=1e-4, atol=1e-5)
    pair.merge_adapter()
    torch.testing.assert_close(pair(tokens), expected(tokens), rtol=1e-4, atol=1e-5)


def test_switching_disabling_and_deleting(pair, net, tokens):
    activate(pair, "second")
    second = pair(tokens)
    activate(pair, "first")
    assert not torch.allclose(pair(tokens), second)
    with pair.disable_adapter():
        assert torch.equal(pair(tokens), net(tokens))
    pair.delete_adapter("first")
    activate(pair, "second")
    assert torch.equal(pair(tokens), second)
    assert not [name for name, _ in pair.named_parameters() if "first" in name]
    assert all(set(layer.weights) == {"second"} for layer in layers(pair))


def test_a_further_adapter_is_not_trained_before_it_is_active(pair):
    trained = {name for name, parameter in pair.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".first" in name for name in trained)
    activate(pair, "second")
    assert all(".second" in n for n, p in pair.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, -2.0)])
def test_weighted_sum_is_exact(pair, weights, net, tokens, tmp_path):
    pair.add_weighted_adapter(["first", "second"], list(weights), "sum")
    first, second, total = (updates(pair, name) for name in ("first", "second", "sum"))
    for name, delta in total.items():
        expected = weights[0] * first[name] + weights[1] * second[name]
        torch.testing.assert_close(delta, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    for name, ranks in pair.base_model.effective_ranks("sum").items():
        sizes = pair.base_model.effective_ranks("first")[name], pair.base_model.effective_ranks("second")[name]
        assert all(r <= a + b for r, a, b in zip(ranks, *sizes, strict=True)), name
    activate(pair, "sum")
    expected = pair(tokens)
    pair.save_pretrained(tmp_path, selected_adapters=["sum"], save_embedding_layers=False)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "sum")
    assert torch.equal(loaded(tokens), expected)


def test_recompressed_sum_is_the_best_fit_of_its_ranks(pair):
    pair.add_weighted_adapter(["first", "second"], [1.0, 1.0], "small", combination_type="hooi", r=2, kernel_rank=1)
    assert pair.base_model.effective_ranks("small")["conv"] == [2, 2, 1]
    total = updates(pair, "first")["fc.weight"] + updates(pair, "second")["fc.weight"]
    left, values, right = torch.linalg.svd(total)
    best = left[:, :2] * values[:2] @ right[:2]  # Eckart-Young
    torch.testing.assert_close(updates(pair, "small")["fc.weight"], best, rtol=1e-3, atol=1e-4)


def test_sums_that_do_not_exist_are_refused(net, pair):
    for arguments, message in [
        ((["first"], [1.0, 2.0], "x"), "weights: 2 given for 1"),
        ((["third"], [1.0], "x"), "third does not exist"),
        ((["first"], [1.0], "second"), "second exists already"),
        ((["first"], [1.0], "x", "ties"), "combination_type"),
    ]:
        with pytest.raises(ValueError, match=message):
            pair.add_weighted_adapter(*arguments)
    magnitude = adapt(net, target_parameters=None, use_dora=True)
    with pytest.raises(ValueError, match="use_dora"):
        magnitude.add_weighted_adapter(["default"], [1.0], "x")
    folded = adapt(net, "first", fold_pattern={"fc": [3, 3, 7]})
    folded.add_adapter("second", flora.FloraConfig(**SETTINGS))
    with pytest.raises(ValueError, match=r"fc.weight is folded differently"):
        folded.add_weighted_adapter(["first", "second"], [1.0, 1.0], "x")
    assert set(folded.peft_config) == {"first", "second"}


def test_scales_can_be_changed_and_restored(net, tokens):
    model = adapt(net, scale=2.0)
    layer = model.base_model.model.fc
    delta = layer.get_delta_weight("default")
    layer.set_scale("default", 0.5)
    torch.testing.assert_close(layer.get_delta_weight("default"), 0.5 * delta)
    layer.scale_layer(3.0)
    torch.testing.assert_close(layer.get_delta_weight("default"), 1.5 * delta)
    layer.unscale_layer(3.0)
    torch.testing.assert_close(layer.get_delta_weight("default"), 0.5 * delta)
    layer.unscale_layer()
    assert torch.equal(layer.get_delta_weight("default"), delta)
