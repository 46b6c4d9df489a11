"""Rivals against the libraries and formulas they come from: updates, counts, places, merging."""

import copy

import loralib
import numpy as np
import peft
import pytest
import timm
import torch
import transformers
from lycoris.modules.locon import LoConModule
from torch import nn
from torch.nn import functional as F

from flora.methods import Peft
from flora.methods.heads import trained
from flora.methods.rivals import (
    BottleneckConfig,
    LoconConfig,
    LoraFlatConfig,
    LotrConfig,
    MosloraConfig,
    OftConfig,
    TriloraConfig,
    VptConfig,
)
from tests.methods.families import FAMILIES, adapter

# in, out, kernel, groups, stride, padding
CONVS = [(6, 10, 3, 1, 1, 1), (3, 8, 4, 1, 4, 0), (8, 8, 7, 8, 1, 3), (6, 12, 3, 3, 2, 1), (5, 7, 1, 1, 1, 0)]


def filled(layer, name="0", **config):
    """A layer adapted by a rival, whose parameters are drawn so that no update is zero."""
    kind = config.pop("config")
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), kind(target_modules=[name], **config))
    adapted = model.base_model.model[0]
    held = adapted.tucker_factors["default"]
    for parameter in held.values():
        nn.init.normal_(parameter)
    return model, adapted, {key: parameter.detach().double().numpy() for key, parameter in held.items()}


def update_of(adapted):
    return adapted.get_delta_weight("default").detach().double().numpy()


# ---------------------------------------------------------------------- lora_flat, dora_flat


@pytest.mark.parametrize("conv", CONVS)
def test_lora_flat_is_loralibs_conv_lora(conv):
    inputs, outputs, kernel, groups, stride, padding = conv
    settings = {"stride": stride, "padding": padding, "groups": groups}
    oracle = loralib.Conv2d(inputs, outputs, kernel, r=3, lora_alpha=6, merge_weights=False, **settings)
    nn.init.normal_(oracle.lora_B)
    model, adapted, _ = filled(oracle.conv, config=LoraFlatConfig, r=3, alpha=6)
    held = adapted.tucker_factors["default"]
    assert {key: tuple(p.shape) for key, p in held.items()} == {
        "A": tuple(oracle.lora_A.shape),
        "B": tuple(oracle.lora_B.shape),
    }
    held["A"].data, held["B"].data = oracle.lora_A.data.clone(), oracle.lora_B.data.clone()
    expected = (oracle.lora_B @ oracle.lora_A).view(oracle.conv.weight.shape) * oracle.scaling
    torch.testing.assert_close(adapted.get_delta_weight("default"), expected)
    x = torch.randn(2, inputs, 9, 9)
    torch.testing.assert_close(model(x), oracle(x))


def test_lora_flat_is_loralibs_linear():
    oracle = loralib.Linear(7, 5, r=2, lora_alpha=6, merge_weights=False)
    nn.init.normal_(oracle.lora_B)
    base = nn.Linear(7, 5)
    base.load_state_dict({"weight": oracle.weight.data, "bias": oracle.bias.data})
    model, adapted, _ = filled(base, config=LoraFlatConfig, r=2, alpha=6)
    held = adapted.tucker_factors["default"]
    held["A"].data, held["B"].data = oracle.lora_A.data.clone(), oracle.lora_B.data.clone()
    x = torch.randn(3, 7)
    torch.testing.assert_close(model(x), oracle(x))


def on_meta(name, method, classes=1000):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=classes)
        head = [model.pretrained_cfg["classifier"]]
        return trained(method.apply(model, head).model, head)[0]


@pytest.mark.parametrize(
    ("name", "changes", "count"),
    [
        ("lora_flat", {"r": 8}, 12946080),
        ("lora_flat", {"r": 16}, 25892160),
        ("lora_flat", {"r": 32}, 51784320),
        ("dora_flat", {"r": 32}, 51949632),
        ("bitfit", {}, 165312),
    ],
)
def test_counts_on_convnextv2_large(name, changes, count):
    assert on_meta("convnextv2_large", adapter(name, **changes)) == count


@pytest.mark.parametrize(("r", "count"), [(2, 331776), (4, 663552), (8, 1327104), (16, 2654208)])
def test_counts_of_lora_on_deberta_v3_base(r, count):
    with torch.device("meta"):
        config = transformers.DebertaV2Config(
            relative_attention=True, position_buckets=256, share_att_key=True, pos_att_type=["p2c", "c2p"]
        )
        assert (config.hidden_size, config.num_hidden_layers) == (1536, 24), "the defaults are those of -xlarge"
        config.hidden_size, config.num_hidden_layers, config.num_attention_heads = 768, 12, 12
        config.intermediate_size = 3072
        model = transformers.DebertaV2ForSequenceClassification(config)
        adapted = adapter("lora", FAMILIES["deberta"], r=r).apply(model, ["classifier"])
    assert trained(adapted.model, ["classifier"])[0] == count


@pytest.mark.parametrize("conv", CONVS)
def test_dora_flat_scales_every_output_to_its_magnitude(conv):
    inputs, outputs, kernel, groups, *_ = conv
    base = nn.Conv2d(inputs, outputs, kernel, groups=groups)
    _, adapted, parts = filled(base, config=LoraFlatConfig, r=2, scale=0.5, use_dora=True)
    magnitude = adapted.tucker_magnitude["default"]["weight"]
    weight = base.weight.detach().double().numpy()
    np.testing.assert_allclose(
        magnitude.detach().numpy(), np.sqrt((weight**2).sum((1, 2, 3))), rtol=1e-5, err_msg="the start"
    )
    nn.init.uniform_(magnitude, 1, 2)
    adapted_weight = weight + 0.5 * (parts["B"] @ parts["A"]).reshape(weight.shape)
    norm = np.sqrt((adapted_weight**2).sum((1, 2, 3), keepdims=True))
    expected = magnitude.detach().double().numpy().reshape(-1, 1, 1, 1) * adapted_weight / norm
    np.testing.assert_allclose(adapted.weight.detach().numpy(), expected, rtol=1e-4, atol=1e-6)
    # The norm is a constant in the gradient: d sum(W')/dB = (magnitude / norm) 0.5 1 A^T, through the reshape.
    adapted.weight.sum().backward()
    upstream = np.broadcast_to(magnitude.detach().double().numpy().reshape(-1, 1, 1, 1) / norm * 0.5, weight.shape)
    gradient = adapted.tucker_factors["default"]["B"].grad.numpy()
    expected = upstream.reshape(parts["B"].shape[0], -1) @ parts["A"].T
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, (3, 1)), nn.Conv1d(3, 4, 3)])
def test_lora_flat_refuses_kernels_that_loralib_does_not_know(layer):
    with pytest.raises(ValueError, match="target_modules: 0: flattening is defined for"):
        filled(layer, config=LoraFlatConfig)


# ---------------------------------------------------------------------- matrices between the factors


SHAPES = [nn.Linear(6, 9), nn.Conv2d(4, 6, 3), nn.Conv2d(8, 8, (5, 3), groups=8), nn.Conv1d(4, 6, 3, groups=2)]


@pytest.mark.parametrize("layer", SHAPES)
@pytest.mark.parametrize(
    ("config", "formula"),
    [
        (MosloraConfig, lambda p: p["B"] @ p["M"] @ p["A"]),
        (TriloraConfig, lambda p: p["B"] @ np.diag(p["E"]) @ p["A"]),
        (LotrConfig, lambda p: p["L"] @ p["M"] @ p["R"]),
    ],
)
def test_updates_are_three_matrices(layer, config, formula):
    _, adapted, parts = filled(layer, config=config, r=3, alpha=6)
    rows, columns = layer.weight.shape[0], layer.weight[0].numel()
    assert sorted(p.shape for p in parts.values()) == sorted(
        [(rows, 3), (3, columns), (3,) if config is TriloraConfig else (3, 3)]
    )
    np.testing.assert_allclose(update_of(adapted), 2 * formula(parts).reshape(layer.weight.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [MosloraConfig, TriloraConfig, LotrConfig, LoraFlatConfig, LoconConfig])
@pytest.mark.parametrize("layer", [nn.Linear(6, 9), nn.Conv2d(4, 6, 3, groups=2)])
def test_running_merging_and_rebuilding_agree(config, layer):
    model, adapted, _ = filled(layer, config=config, r=3, scale=0.3)
    x = torch.randn(2, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 5, 5)
    weight = torch.from_numpy(layer.weight.detach().numpy() + update_of(adapted)).float()
    op = F.linear if isinstance(layer, nn.Linear) else lambda *a: F.conv2d(*a, groups=2)
    expected = op(x, weight, layer.bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), layer(x))
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- locon_tucker


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 8, 3), nn.Conv2d(8, 8, 7, groups=8), nn.Conv1d(6, 8, 3)])
def test_locon_is_lycoris_module_and_a_tucker_2_form(layer):
    _, adapted, parts = filled(layer, config=LoconConfig, r=3, alpha=6)
    down, up = parts["down"][:, :, 0], parts["up"][:, :, 0]
    down, up = down.reshape(3, -1), up.reshape(-1, 3)
    expected = 2 * np.einsum("oa,ab...,bi->oi...", up, parts["mid"], down)
    np.testing.assert_allclose(update_of(adapted), expected, rtol=1e-4, atol=1e-5)

    module = LoConModule("x", copy.deepcopy(layer), lora_dim=3, alpha=6, use_tucker=True)
    held = adapted.tucker_factors["default"]
    module.lora_down.weight.data = held["down"].data
    module.lora_up.weight.data = held["up"].data
    module.lora_mid.weight.data = held["mid"].data
    difference, _ = module.get_diff_weight()
    torch.testing.assert_close(adapted.get_delta_weight("default"), difference, rtol=1e-4, atol=1e-5)


def test_locon_has_no_middle_where_there_is_no_kernel():
    for layer in (nn.Linear(6, 8), nn.Conv2d(6, 8, 1)):
        _, adapted, parts = filled(layer, config=LoconConfig, r=3, scale=1.0)
        assert set(parts) == {"down", "up"}
        product = parts["up"].reshape(8, 3) @ parts["down"].reshape(3, 6)
        np.testing.assert_allclose(update_of(adapted), product.reshape(layer.weight.shape), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------- lotr


def lotr_model():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(6, 4))
    torch.manual_seed(5)
    return peft.get_peft_model(model, LotrConfig(r=2, target_modules=["0", "1", "2", "3", "4"]))


def test_lotr_shares_factors_between_layers_of_one_shape(tmp_path):
    model = lotr_model()
    layers = list(model.base_model.model)
    held = [layer.tucker_factors["default"] for layer in layers]
    shared = {(i, j) for i in range(5) for j in range(i) if held[i]["L"] is held[j]["L"]}
    assert shared == {(1, 0), (4, 2)} == {(i, j) for i in range(5) for j in range(i) if held[i]["R"] is held[j]["R"]}
    assert len({id(h["M"]) for h in held}) == 5
    # three shapes, r (out + in) each, and five cores
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (12 + 10 + 10) + 5 * 4

    for h in held:
        nn.init.normal_(h["M"])
    x = torch.randn(3, 6)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).zero_grad()
    model(x).sum().backward()
    assert all(h["L"].grad is not None for h in held)
    model.save_pretrained(str(tmp_path))
    again = lotr_model().base_model.model
    base = nn.Sequential(*[layer.get_base_layer() for layer in again])
    base.load_state_dict(nn.Sequential(*[layer.get_base_layer() for layer in layers]).state_dict())
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(loaded(x), model(x))
    held = [layer.tucker_factors["default"] for layer in loaded.base_model.model]
    assert held[0]["L"] is held[1]["L"]


# ---------------------------------------------------------------------- oft


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 6, 3, padding=1, stride=2), nn.Conv2d(8, 6, 1), nn.Linear(8, 6)])
def test_oft_rotates_and_runs_as_it_merges(layer):
    config = OftConfig(target_modules=["0"], oft_block_size=4, use_cayley_neumann=False)
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
    linear = isinstance(layer, nn.Linear)
    x = torch.randn(2, 5, 5, 8) if linear else torch.randn(2, 8, 7, 7)
    torch.testing.assert_close(model(x), layer(x))
    nn.init.normal_(model.base_model.model[0].oft_R["default"].weight, std=0.3)
    turned = model(x).detach()
    assert (turned - layer(x)).abs().max() > 0.05
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), turned, rtol=1e-4, atol=1e-5)
    # A rotation keeps the angles between the filters.
    before, after = layer.weight.detach().flatten(1), merged[0].weight.detach().flatten(1)
    torch.testing.assert_close(after @ after.T, before @ before.T, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- bottlenecks


PLACES = {
    ("houlsby", "bert"): ["attention.output.dense", "output.dense"],
    ("pfeiffer", "bert"): ["output.dense"],
    ("parallel_adapter", "bert"): ["output"],
    ("houlsby", "llama"): ["self_attn.o_proj", "mlp.down_proj"],
    ("pfeiffer", "llama"): ["mlp.down_proj"],
    ("parallel_adapter", "llama"): ["mlp"],
}


def places(name, family):
    adapted = adapter(name, FAMILIES[family]).apply(FAMILIES[family].build(), FAMILIES[family].head)
    modules = adapted.model.base_model.model.named_modules()
    return [n for n, m in modules if hasattr(m, "bottleneck_down") and not n.endswith("base_layer")]


@pytest.mark.parametrize(("name", "family"), PLACES)
def test_bottlenecks_sit_where_their_papers_put_them(name, family):
    stem = {"bert": "bert.encoder.layer", "llama": "model.layers"}[family]
    assert sorted(places(name, family)) == sorted(f"{stem}.{i}.{p}" for i in (0, 1) for p in PLACES[name, family])


def test_bottlenecks_in_the_vision_families():
    assert places("pfeiffer", "vit") == [f"blocks.{i}.mlp.fc2" for i in range(3)]
    assert places("parallel_adapter", "vit") == [f"blocks.{i}.mlp" for i in range(3)]
    blocks = ["stages.0.blocks.0", "stages.1.blocks.0", "stages.2.blocks.0", "stages.2.blocks.1", "stages.3.blocks.0"]
    assert places("houlsby", "convnext") == places("pfeiffer", "convnext") == blocks
    assert places("parallel_adapter", "convnext") == [f"{block}.mlp" for block in blocks]
    assert places("pfeiffer", "resnet") == ["layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0"]
    assert places("parallel_adapter", "resnet") == ["layer1.1"]
    llava = places("parallel_adapter", "llava") + places("houlsby", "llava")
    assert llava
    assert all(name.startswith("model.language_model.layers.") for name in llava)


def numpy_adapter(layer, x):
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    parts = [p.detach().numpy() for p in (down.weight, down.bias, up.weight, up.bias)]
    return np.maximum(x @ parts[0].T + parts[1], 0) @ parts[2].T + parts[3]


def bottlenecked(module, **settings):
    model = peft.get_peft_model(nn.Sequential(module), BottleneckConfig(target_modules=["0"], r=3, **settings))
    layer = model.base_model.model[0]
    nn.init.normal_(layer.bottleneck_up["default"].weight)
    nn.init.normal_(layer.bottleneck_up["default"].bias)
    return model, layer


def test_a_bottleneck_follows_or_accompanies_its_module():
    linear, x = nn.Linear(5, 5), torch.randn(2, 4, 5)
    model, layer = bottlenecked(linear, scale=0.5)
    y = linear(x).detach().numpy()
    np.testing.assert_allclose(model(x).detach().numpy(), y + 0.5 * numpy_adapter(layer, y), rtol=1e-4, atol=1e-5)
    model, layer = bottlenecked(linear, scale=0.5, parallel=True)
    expected = y + 0.5 * numpy_adapter(layer, x.numpy())
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * (2 * 5 + 1) + 5


def test_a_bottleneck_reads_the_channels_of_maps():
    conv, x = nn.Conv2d(3, 5, 1), torch.randn(2, 3, 4, 6)
    model, layer = bottlenecked(conv)
    y = conv(x).detach().numpy()
    expected = y + numpy_adapter(layer, y.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_parallel_bottleneck_joins_the_residual_of_bert():
    config = transformers.BertConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2)
    output = transformers.models.bert.modeling_bert.BertOutput(config).eval()
    _, layer = bottlenecked(output, parallel=True, scale=2.0)
    layer.eval()
    hidden, residual = torch.randn(2, 3, 12), torch.randn(2, 3, 8)
    beside = torch.from_numpy(2 * numpy_adapter(layer, residual.numpy()))
    expected = output.LayerNorm(output.dense(hidden) + beside + residual)
    torch.testing.assert_close(layer(hidden, residual), expected, rtol=1e-4, atol=1e-5)


def test_added_modules_are_not_merged():
    model, _ = bottlenecked(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="do not merge"):
        model.merge_and_unload()
    x = torch.randn(2, 4)
    with model.disable_adapter():
        plain = model(x)
    torch.testing.assert_close(model.unload()(x), plain)


def test_a_bottleneck_needs_a_layer_to_follow():
    with pytest.raises(ValueError, match=r"target_modules: 0 \(LayerNorm\) holds no linear layer"):
        bottlenecked(nn.LayerNorm(4))


# ---------------------------------------------------------------------- vpt


@pytest.mark.parametrize("deep", [True, False])
def test_prompts_are_tokens_between_the_class_token_and_the_patches(deep):
    vit = FAMILIES["vit"].build().eval()
    plain = copy.deepcopy(vit)
    model = peft.get_peft_model(vit, VptConfig(num_tokens=4, deep=deep)).eval()
    prompts = [b.vpt_prompts["default"] for b in model.base_model.model.blocks if "default" in b.vpt_prompts]
    assert len(prompts) == (3 if deep else 1)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == len(prompts) * 4 * 24
    bound = np.sqrt(6 / (3 * 4 * 4 + 24))
    assert 0.8 * bound < max(p.abs().max().item() for p in prompts) <= bound

    x = torch.randn(2, 3, 16, 16)
    tokens = plain._pos_embed(plain.patch_embed(x))
    seen = []
    for index, block in enumerate(plain.blocks):
        if index < len(prompts):
            tokens = torch.cat([tokens[:, :1], prompts[index].expand(2, 4, 24), tokens[:, -16:]], dim=1)
        tokens = block(tokens)
        seen.append(tokens.shape[1])
    assert seen == [21, 21, 21]
    expected = plain.forward_head(plain.norm(torch.cat([tokens[:, :1], tokens[:, -16:]], dim=1)))
    torch.testing.assert_close(model(x), expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), plain(x))


def test_vpt_refuses_other_models():
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(3, 3)])
    with pytest.raises(ValueError, match="target_modules: vpt needs a vision transformer"):
        peft.get_peft_model(model, VptConfig())


# ---------------------------------------------------------------------- norms, names


def test_norm_tuning_trains_every_norm_and_nothing_else():
    for family in ("convnext", "resnet", "vit", "bert", "llama"):
        base = FAMILIES[family].build()
        norms = [n for n, m in base.named_modules() if type(m).__name__.endswith(("Norm", "Norm2d", "NormAct2d"))]
        expected = sum(p.numel() for n in norms for p in base.get_submodule(n).parameters())
        head = FAMILIES[family].head
        adapted = adapter("norm_tuning", FAMILIES[family]).apply(FAMILIES[family].build(), head)
        if family == "convnext":
            assert any("grn" in n for n, p in adapted.model.named_parameters() if p.requires_grad)
        assert trained(adapted.model, head)[0] == expected > 0, family


def test_targets_are_not_taken_for_endings_of_other_names():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)

        def forward(self, x):
            return self.conv(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.inner, self.head = nn.Conv2d(3, 4, 3), Inner(), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.inner(self.conv(x)).mean((2, 3)))

    method = Peft("lora", "peft.LoraConfig", skip_depthwise=True, r=2)
    adapted = method.apply(Outer(), ["head"])
    assert adapted.skipped == ["inner.conv"]
    assert list(adapted.ranks) == ["conv"]
