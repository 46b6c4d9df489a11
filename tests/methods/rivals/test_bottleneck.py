"""Bottleneck adapters: their places, and what they compute."""

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn

from flora.methods.rivals import (
    BottleneckConfig,
)
from tests.methods.families import FAMILIES, adapter

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
