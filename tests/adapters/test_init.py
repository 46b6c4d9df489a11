"""How adapters start: nothing changes, factors have the published spread, only the core gets a gradient."""

import copy
import math
import warnings

import hypothesis
import numpy as np
import peft
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import flora
from flora.adapters import FloraLayer

from .layer_cases import LAYERS, Holder

PRESETS = ("orthogonal", "paper", "nlu", "llm", "hosvd")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", LAYERS)
@hypothesis.settings(max_examples=4, deadline=None, derandomize=True)
@hypothesis.given(data=st.data(), seed=st.integers(0, 2**16))
def test_nothing_changes_at_the_start(kind, preset, data, seed):
    torch.manual_seed(seed)
    case = LAYERS[kind](data.draw)
    case.config.init = preset
    if case.target_parameters:
        case.config.target_parameters = ["layer.experts"]
    else:
        case.config.target_modules = ["layer"]
    base = Holder(copy.deepcopy(case.layer)).eval()
    model = peft.get_peft_model(Holder(case.layer), case.config).eval()
    for layer in model.modules():
        if isinstance(layer, FloraLayer):
            for name in layer.weights["default"]:
                assert not layer.get_delta_weight("default", name).any()
    assert torch.equal(model(*case.args), base(*case.args))


@pytest.mark.parametrize("layer", [nn.Linear(9, 7), nn.Conv2d(6, 8, 3), nn.Embedding(9, 5), nn.LSTM(5, 4)])
def test_magnitudes_start_at_the_norms(layer):
    x = {nn.Conv2d: torch.randn(2, 6, 5, 5), nn.Embedding: torch.arange(9), nn.LSTM: torch.randn(3, 2, 5)}
    x = x.get(type(layer), torch.randn(2, 9))
    base = Holder(copy.deepcopy(layer))(x)
    model = peft.get_peft_model(Holder(layer), flora.FloraConfig(target_modules=["layer"], use_dora=True))
    assert (model(x) - base).abs().max() <= 1e-6 * base.abs().max()


def factors_of(config: flora.FloraConfig, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and input factor of one wide linear layer."""
    config.target_modules = ["layer"]
    model = peft.get_peft_model(Holder(nn.Linear(size, size)), config)
    out, inward = model.base_model.model.layer.factors("default")
    return out.detach(), inward.detach()


def assert_spread(values: torch.Tensor, std: float, kurtosis: float) -> None:
    """Within 4 standard errors of the mean (0) and of the standard deviation, over at least 1e5 draws."""
    n = values.numel()
    assert n >= 1e5
    assert abs(values.mean()) < 4 * std / math.sqrt(n)
    assert abs(values.std() - std) < 4 * std * math.sqrt((kurtosis - 1) / (4 * n))


@pytest.mark.parametrize(("r", "rounded"), [(64, 0.088), (128, None)])
def test_paper_preset_has_the_repositorys_spread(r, rounded):
    std = math.sqrt(0.5 / r)
    assert rounded is None or round(std, 3) == rounded
    for factor in factors_of(flora.FloraConfig(r=r, init="paper"), 2048):
        assert_spread(factor, std, kurtosis=3)


def test_nlu_preset_has_loralibs_spread():
    for factor in factors_of(flora.FloraConfig(r=64, init="nlu"), 2048):
        assert_spread(factor, 0.02, kurtosis=3)


def test_llm_preset_has_the_spread_of_two_linear_layers():
    out, inward = factors_of(flora.FloraConfig(r=64, init="llm"), 2048)
    # Kaiming uniform with a = sqrt(5): bound 1 / sqrt(fan-in), which is r for B (out x r) and the input size for A.
    for factor, fan_in in ((out, 64), (inward, 2048)):
        bound = 1 / math.sqrt(fan_in)
        assert factor.abs().max() <= bound
        assert_spread(factor, bound / math.sqrt(3), kurtosis=1.8)


def test_orthogonal_preset_has_orthonormal_columns():
    for factor in factors_of(flora.FloraConfig(r=16), 300):
        torch.testing.assert_close(factor.T @ factor, torch.eye(16), atol=1e-5, rtol=0)


def test_hosvd_preset_spans_the_leading_subspaces():
    conv = nn.Conv2d(12, 10, (5, 3))
    weight = conv.weight.detach().double().numpy()
    model = peft.get_peft_model(
        Holder(conv), flora.FloraConfig(target_modules=["layer"], r=4, kernel_rank=2, init="hosvd")
    )
    for mode, factor in enumerate(model.base_model.model.layer.factors("default")):
        left = np.linalg.svd(np.moveaxis(weight, mode, 0).reshape(weight.shape[mode], -1), full_matrices=False)[0]
        left = left[:, : factor.shape[1]]
        projector = (factor @ factor.T).detach().numpy()
        np.testing.assert_allclose(projector, left @ left.T, atol=1e-4)


def test_published_presets_are_for_any_number_of_modes():
    for preset in ("nlu", "llm"):
        model = nn.Sequential(nn.Conv3d(4, 4, 3))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            peft.get_peft_model(model, flora.FloraConfig(target_modules=["0"], init=preset))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_first_gradient_reaches_only_the_core(preset):
    model = peft.get_peft_model(nn.Sequential(nn.Conv2d(6, 8, 3)), flora.FloraConfig(target_modules=["0"], init=preset))
    model(torch.randn(2, 6, 7, 7)).square().sum().backward()
    layer = model.base_model.model[0]
    assert layer.core("default").grad.abs().max() > 0
    assert all(not factor.grad.any() for factor in layer.factors("default"))
