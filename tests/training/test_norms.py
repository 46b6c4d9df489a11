"""Norm of the change and amplification, against numpy and hand-made weights."""

import types

import numpy as np
import peft
import pytest
import torch
from torch import nn

import flora
from flora.errors import ConfigError
from flora.training.norms import DeltaNorms, norm_and_amplification


def test_the_two_numbers_by_hand():
    # delta = 3 e1 e2^T; weight has 6 at (1, 2): |delta| = 3, |u^T W v| = 6, factor 1/2
    weight, delta = torch.tensor([[1.0, 6.0], [5.0, 2.0]]), torch.tensor([[0.0, 3.0], [0.0, 0.0]])
    assert norm_and_amplification(weight, delta, rank=1) == pytest.approx((3.0, 0.5))


def test_the_two_numbers_of_a_convolution_against_numpy():
    weight, delta = torch.randn(6, 2, 3, 3), torch.randn(6, 2, 3, 3)
    w, d = weight.numpy().reshape(6, 18), delta.numpy().reshape(6, 18)
    u, _, vh = np.linalg.svd(d)
    expected = np.linalg.norm(d), np.linalg.norm(d) / np.linalg.norm(u[:, :2].T @ w @ vh[:2].T)
    assert norm_and_amplification(weight, delta, rank=2) == pytest.approx(expected, rel=1e-4)


def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 2))


def begun(model):
    callback = DeltaNorms(types.SimpleNamespace(model=model), head=["3"], every_n_steps=1, rank=2)
    callback.on_train_begin(None, None, None)
    return callback


@pytest.mark.parametrize(
    "config",
    [
        flora.FloraConfig(r=2, kernel_rank=2, target_modules=["0", "2"], init="paper"),
        peft.LoraConfig(r=2, target_modules=["0", "2"]),
        peft.LoraConfig(r=2, target_modules=["0", "2"], use_dora=True),
    ],
    ids=["flora", "lora", "dora"],
)
def test_the_change_of_an_adapter_is_merged_minus_base(config):
    model = peft.get_peft_model(net(), config)
    before = {n: m.weight.detach().clone() for n, m in enumerate(net_layers(model))}
    callback = begun(model)
    assert callback.measure()["delta_norm"] == pytest.approx(0.0, abs=1e-5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter)) if "magnitude" in name else parameter.normal_()
    measured = callback.measure()["delta_norm"]
    merged = model.merge_and_unload()
    norms = [(m.weight - before[i]).norm().item() for i, m in enumerate((merged[0], merged[2]))]
    assert measured == pytest.approx(np.mean(norms), rel=1e-4)


def test_a_small_change_of_a_half_precision_weight_is_measured_whole():
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)).bfloat16(), peft.LoraConfig(r=2, target_modules=["0"]))
    (layer,) = (m for m in model.modules() if hasattr(m, "get_delta_weight"))
    with torch.no_grad():
        layer.get_base_layer().weight.fill_(1.0)
        layer.lora_B["default"].weight.normal_(std=1e-4)
        delta = layer.get_delta_weight("default").float()
    # 1 + 0.001 is 1 in bfloat16, whose next number is 1.0078
    assert begun(model).measure()["delta_norm"] == pytest.approx(delta.norm().item(), rel=1e-2)


def net_layers(model):
    return [m.get_base_layer() for m in model.modules() if hasattr(m, "get_base_layer") and hasattr(m, "merge")]


def test_full_fine_tuning_is_measured_from_its_start_without_the_head():
    model = net()
    callback = begun(model)
    with torch.no_grad():
        model[0].weight.add_(1.0)
        model[3].weight.add_(100.0)  # the head
    # 8 * 3 * 3 * 3 = 216 entries of 1; the other layer has not moved and does not count
    assert callback.measure()["delta_norm"] == pytest.approx(216**0.5)


def test_a_method_that_moves_no_weight_and_odd_settings_are_refused():
    with pytest.raises(ConfigError, match="changes no weight"):
        begun(net().requires_grad_(False))
    with pytest.raises(ConfigError, match=r"analysis\.every_n_steps"):
        DeltaNorms(None, [], every_n_steps=0, rank=8)
