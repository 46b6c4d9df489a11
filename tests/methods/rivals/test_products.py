"""Rivals whose update is a product: against formulas and the lycoris package, run, merged and rebuilt."""

import copy

import numpy as np
import pytest
import torch
from lycoris.modules.locon import LoConModule
from torch import nn
from torch.nn import functional as F

from flora.methods.rivals import (
    LoconConfig,
    LoraFlatConfig,
    LotrConfig,
    MosloraConfig,
    TriloraConfig,
)
from tests.methods.rivals.layers import SHAPES, filled, update_of


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


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 8, 3), nn.Conv2d(8, 8, 7, groups=8), nn.Conv1d(6, 8, 3)])
def test_locon_is_lycoris_module_and_a_tucker_2_form(layer):
    _, adapted, parts = filled(layer, config=LoconConfig, r=3, alpha=6)
    down, up = parts["down"][:, :, 0], parts["up"][:, :, 0]
    down, up = down.reshape(3, -1), up.reshape(-1, 3)
    expected = 2 * np.einsum("oa,ab...,bi->oi...", up, parts["mid"], down)
    np.testing.assert_allclose(update_of(adapted), expected, rtol=1e-4, atol=1e-5)

    module = LoConModule("x", copy.deepcopy(layer), lora_dim=3, alpha=6, use_tucker=True)
    factors = adapted.tucker_factors["default"]
    module.lora_down.weight.data = factors["down"].data
    module.lora_up.weight.data = factors["up"].data
    module.lora_mid.weight.data = factors["mid"].data
    difference, _ = module.get_diff_weight()
    torch.testing.assert_close(adapted.get_delta_weight("default"), difference, rtol=1e-4, atol=1e-5)


def test_locon_has_no_middle_where_there_is_no_kernel():
    for layer in (nn.Linear(6, 8), nn.Conv2d(6, 8, 1)):
        _, adapted, parts = filled(layer, config=LoconConfig, r=3, scale=1.0)
        assert set(parts) == {"down", "up"}
        product = parts["up"].reshape(8, 3) @ parts["down"].reshape(3, 6)
        np.testing.assert_allclose(update_of(adapted), product.reshape(layer.weight.shape), rtol=1e-4, atol=1e-6)
