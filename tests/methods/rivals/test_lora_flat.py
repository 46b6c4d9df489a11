"""lora_flat and dora_flat against loralib and numpy."""

import loralib
import numpy as np
import pytest
import timm
import torch
import transformers
from torch import nn

from flora.methods.heads import trained
from flora.methods.rivals import (
    LoraFlatConfig,
)
from tests.methods.families import FAMILIES, adapter
from tests.methods.rivals.layers import CONVS, filled


@pytest.mark.parametrize("conv", CONVS)
def test_lora_flat_is_loralibs_conv_lora(conv):
    inputs, outputs, kernel, groups, stride, padding = conv
    settings = {"stride": stride, "padding": padding, "groups": groups}
    oracle = loralib.Conv2d(inputs, outputs, kernel, r=3, lora_alpha=6, merge_weights=False, **settings)
    nn.init.normal_(oracle.lora_B)
    model, adapted, _ = filled(oracle.conv, config=LoraFlatConfig, r=3, alpha=6)
    factors = adapted.tucker_factors["default"]
    assert {key: tuple(p.shape) for key, p in factors.items()} == {
        "A": tuple(oracle.lora_A.shape),
        "B": tuple(oracle.lora_B.shape),
    }
    factors["A"].data, factors["B"].data = oracle.lora_A.data.clone(), oracle.lora_B.data.clone()
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
    factors = adapted.tucker_factors["default"]
    factors["A"].data, factors["B"].data = oracle.lora_A.data.clone(), oracle.lora_B.data.clone()
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
