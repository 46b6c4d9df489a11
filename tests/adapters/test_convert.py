"""Converters: what comes in and what goes out makes the same updates."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import flora
from flora.adapters import convert, export

from .published import PublishedModel


class Net(nn.Module):
    """One layer of each kind that other layouts know; ``c`` is also the ending of another layer's name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.c = Conv1D(8, 6)
        self.conv1 = nn.Conv1d(8, 7, 3, padding=1)
        self.conv2 = nn.Conv2d(7, 10, (3, 2), stride=2, padding=1)
        self.point = nn.Conv2d(10, 9, 1)
        self.conv3 = nn.Conv3d(9, 5, (1, 2, 2))
        self.block = nn.ModuleDict({"c": nn.Linear(5, 4), "head": nn.Linear(4, 3)})
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv1(self.c(self.embed(tokens)).mT)
        x = self.point(self.conv2(x.unflatten(2, (3, 4))))
        x = self.conv3(x.unsqueeze(2)).mean((2, 3, 4))
        return self.block["head"](torch.tanh(self.block["c"](x)))


LAYERS = ["embed", "c", "conv1", "conv2", "point", "conv3", "block.c"]
TARGETS = "embed|c|conv1|conv2|point|conv3|block.c"


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(20, (5, 12))


@pytest.fixture
def net() -> Net:
    return Net().eval()


def adapted(net: nn.Module, **settings) -> peft.PeftModel:
    settings = {"target_modules": TARGETS, "r": 3, "kernel_rank": 2, "scale": 0.7} | settings
    return peft.get_peft_model(copy.deepcopy(net), flora.FloraConfig(**settings, init_weights=False)).eval()


def updates(model: peft.PeftModel, base: nn.Module) -> dict[str, Tensor]:
    """By layer: what merging changes in the weight."""
    merged = copy.deepcopy(model).merge_and_unload()
    return {name: merged.get_submodule(name).weight - base.get_submodule(name).weight for name in LAYERS}


def assert_same_updates(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, delta in expected.items():
        assert delta.abs().max() > 1e-3
        torch.testing.assert_close(actual[name], delta, rtol=0, atol=1e-5 * delta.abs().max().item())


@pytest.mark.parametrize(
    ("layer", "ranks"),
    [
        (nn.Linear(9, 6), [3, 4]),
        (nn.Conv2d(6, 8, 3), [3, 4, 2, 2]),
        (nn.Conv2d(6, 8, 1), [3, 4, 2, 2]),
        (nn.Conv3d(4, 5, (3, 2, 1)), [2, 3, 2, 2, 2]),
    ],
)
def test_published_layers_have_the_same_update(layer, ranks):
    model = nn.Sequential(nn.Identity(), layer)
    published = PublishedModel(copy.deepcopy(model), {"1": ranks}, scale=4.0)
    forms = convert.from_published(published.checkpoint(), scale=4.0)
    converted = convert.attach(model, forms)
    expected = published.model[1].flora_layer.delta()
    delta = converted.base_model.model[1].get_delta_weight("default")
    assert expected.shape == layer.weight.shape
    torch.testing.assert_close(delta, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("alpha", [16.0, 0.0])
@pytest.mark.parametrize("layout", ["loralib", "peft fork"])
def test_published_nlp_layers_have_the_same_update(layout, alpha):
    rank, suffix = 4, "" if layout == "loralib" else ".weight"
    inward, middle, outward = torch.randn(rank, 9), torch.randn(rank, rank), torch.randn(6, rank)
    name = "0" if layout == "loralib" else "base_model.model.0"
    state = {f"{name}.lora_{key}{suffix}": value for key, value in zip("AEB", (inward, middle, outward), strict=True)}
    converted = convert.attach(nn.Sequential(nn.Linear(9, 6)), convert.from_published_nlp(state, alpha))
    x = torch.randn(3, 9)
    if layout == "loralib":  # alpha / (r + 1e-5), r for an alpha of 0
        expected = (x @ (inward.T @ middle.T) @ outward.T) * (alpha if alpha > 0 else rank) / (rank + 1e-5)
    else:
        expected = ((x @ inward.T) @ middle.T @ outward.T) * alpha / rank
    actual = x @ converted.base_model.model[0].get_delta_weight("default").T
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


def test_lora_adapters_come_in_exactly(net, tokens, tmp_path):
    config = peft.LoraConfig(
        r=3, lora_alpha=5, rank_pattern={"conv2": 2}, alpha_pattern={"^block.c": 7}, target_modules=TARGETS,
        init_lora_weights=False, use_rslora=True,
    )  # fmt: skip
    lora = peft.get_peft_model(copy.deepcopy(net), config).eval()
    lora.save_pretrained(tmp_path, save_embedding_layers=False)
    converted = convert.attach(copy.deepcopy(net), convert.from_lora(net, tmp_path)).eval()
    assert_same_updates(updates(converted, net), updates(lora, net))
    torch.testing.assert_close(converted(tokens), lora(tokens), rtol=1e-4, atol=1e-4)


def test_adapters_go_out_as_lora(net, tokens, tmp_path):
    model = adapted(net, rank_pattern={"conv2": [4, 2, 1, 2]}, modules_to_save=["block.head"])
    model.base_model.model.block["head"].modules_to_save["default"].weight.data.mul_(2)
    export.to_lora(model, tmp_path)
    lora = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path).eval()
    assert lora.peft_config["default"].peft_type == peft.PeftType.LORA
    assert_same_updates(updates(lora, net), updates(model, net))
    torch.testing.assert_close(lora(tokens), model(tokens), rtol=1e-4, atol=1e-4)


def test_lora_there_and_back(net, tmp_path):
    model = adapted(net)
    export.to_lora(model, tmp_path)
    back = convert.attach(copy.deepcopy(net), convert.from_lora(net, tmp_path))
    assert_same_updates(updates(back, net), updates(model, net))


def test_adapters_go_out_as_tucker_locon(net, tmp_path):
    model = adapted(net, target_modules=["conv2", "point"], rank_pattern={"conv2": [5, 2, 2, 1]})
    export.to_lycoris(model, tmp_path / "locon.safetensors")
    state = load_file(tmp_path / "locon.safetensors")
    for name in ("conv2", "point"):
        up, down = state[f"lycoris_{name}.lora_up.weight"], state[f"lycoris_{name}.lora_down.weight"]
        scale = state[f"lycoris_{name}.alpha"] / down.shape[0]
        if name == "conv2":  # LyCORIS rebuilds the weight from a middle convolution between two pointwise ones
            mid = state["lycoris_conv2.lora_mid.weight"]
            delta = torch.einsum("oi,ijhw,jc->ochw", up[..., 0, 0], mid, down[..., 0, 0]) * scale
        else:
            delta = torch.einsum("oi,ic->oc", up[..., 0, 0], down[..., 0, 0])[..., None, None] * scale
        expected = model.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(delta, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_fine_tune_of_low_rank_comes_back_exactly(net, tokens):
    model = adapted(net)
    tuned = copy.deepcopy(model).merge_and_unload()
    for how in ({"ranks": (3, 2)}, {"energy": 1 - 1e-9}):
        forms = convert.from_difference(net.state_dict(), tuned.state_dict(), LAYERS, **how)
        compressed = convert.attach(copy.deepcopy(net), forms).eval()
        torch.testing.assert_close(compressed(tokens), tuned(tokens), rtol=1e-4, atol=1e-4)


def test_less_energy_takes_lower_ranks_and_keeps_that_share(net):
    tuned = Net()
    difference = tuned.conv2.weight - net.conv2.weight
    before = 0
    for energy in (0.3, 0.6, 0.9, 0.99):
        form = convert.from_difference(net.state_dict(), tuned.state_dict(), ["conv2"], energy=energy)["conv2"]
        assert sum(form.core.shape) >= before
        before = sum(form.core.shape)
        # Each of N modes loses at most 1 - energy, so the form loses at most N times that.
        assert form.core.norm() ** 2 >= (1 - 4 * (1 - energy)) * difference.norm() ** 2


def test_converted_adapters_are_saved_and_loaded_like_any_other(net, tokens, tmp_path):
    tuned = copy.deepcopy(adapted(net)).merge_and_unload()
    forms = convert.from_difference(net.state_dict(), tuned.state_dict(), LAYERS, ranks=(2, 2))
    model = convert.attach(copy.deepcopy(net), forms).eval()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path).eval()
    assert torch.equal(loaded(tokens), model(tokens))
    assert loaded.base_model.effective_ranks() == model.base_model.effective_ranks()


UNEXPORTABLE = {
    "grouped": (nn.Conv2d(4, 4, 3, groups=2), {}),
    "transposed": (nn.ConvTranspose2d(4, 4, 3), {}),
    "attention": (nn.MultiheadAttention(4, 2), {}),
    "recurrent": (nn.GRU(4, 4), {}),
    "reflecting": (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), {}),
    "dilated": (nn.Conv2d(4, 4, 3, dilation=2), {}),
    "folded": (nn.Linear(4, 12), {"fold_pattern": {"0": [3, 4, 4]}}),
    "magnitude": (nn.Linear(4, 4), {"use_dora": True}),
}


@pytest.mark.parametrize("case", UNEXPORTABLE)
def test_updates_that_lora_cannot_hold_are_refused(case, tmp_path):
    layer, settings = UNEXPORTABLE[case]
    model = peft.get_peft_model(
        nn.Sequential(copy.deepcopy(layer)), flora.FloraConfig(target_modules=["0"], **settings)
    )
    for write in (export.to_lora, export.to_lycoris):
        with pytest.raises(ValueError, match=r"^0: .*merge the adapter instead"):
            write(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lycoris_takes_conv2d_only(net, tmp_path):
    with pytest.raises(ValueError, match=r"block.c: Linear has no Tucker LoCon"):
        export.to_lycoris(adapted(net, target_modules=["block.c"]), tmp_path / "x.safetensors")


def test_bad_sources(net, tmp_path):
    with pytest.raises(ValueError, match=r"no .*param_G"):
        convert.from_published({}, scale=1.0)
    with pytest.raises(ValueError, match=r"a.flora_layer.param_0 is missing"):
        convert.from_published({"a.flora_layer.param_G": torch.ones(2, 2)}, scale=1.0)
    with pytest.raises(ValueError, match=r"no .*lora_E"):
        convert.from_published_nlp({}, alpha=1.0)
    with pytest.raises(ValueError, match="exactly one"):
        convert.from_difference({}, {}, [], ranks=(2, 2), energy=0.5)
    with pytest.raises(ValueError, match=r"conv2.weight is missing"):
        convert.from_difference({}, {}, ["conv2"], energy=0.5)
    with pytest.raises(ValueError, match="safetensors does not exist"):
        convert.from_lora(net, tmp_path)
    adapted(net).save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(ValueError, match="peft_type is FLORA"):
        convert.from_lora(net, tmp_path)
    form = convert.TuckerUpdate(torch.ones(1, 1), [torch.ones(3, 1), torch.ones(3, 1)])
    with pytest.raises(ValueError, match="no such layer"):
        convert.attach(net, {"nowhere": form})
    with pytest.raises(ValueError, match=r"shape \[3, 3\] does not fit the weight, which is \[4, 5\]"):
        convert.attach(net, {"block.c": form})


def test_lora_config_says_alpha_is_the_rank(net, tmp_path):
    export.to_lora(adapted(net), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    assert config["alpha_pattern"] == config["rank_pattern"]
