"""How adapters start: nothing changes, factors have the published spread, what is zero gets the first gradient."""

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
from transformers.pytorch_utils import Conv1D

import flora
from flora.adapters import FloraLayer
from flora.adapters.config import INITS

from .layer_cases import LAYERS, Holder

ZERO_CORE = ("orthogonal", "paper", "nlu", "llm", "hosvd")


def test_the_default_is_the_one_start_whose_core_is_not_zero():
    assert {*INITS} - {*ZERO_CORE} == {"zero_output"} == {flora.FloraConfig().init}


@pytest.mark.parametrize("preset", INITS)
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
    for factor in factors_of(flora.FloraConfig(r=16, init="orthogonal"), 300):
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


@pytest.mark.parametrize("preset", ZERO_CORE)
def test_the_first_gradient_reaches_only_the_core(preset):
    model = peft.get_peft_model(nn.Sequential(nn.Conv2d(6, 8, 3)), flora.FloraConfig(target_modules=["0"], init=preset))
    model(torch.randn(2, 6, 7, 7)).square().sum().backward()
    layer = model.base_model.model[0]
    assert layer.core("default").grad.abs().max() > 0
    assert all(not factor.grad.any() for factor in layer.factors("default"))


# A layer of each kind, the weight that is adapted, and the mode that counts its outputs.
OUTPUT_MODES = {
    "linear": (nn.Linear(6, 8), {}, "weight", 0),
    "one output": (nn.Linear(6, 1), {}, "weight", None),
    "convolution": (nn.Conv2d(6, 8, 3), {}, "weight", 0),
    "grouped": (nn.Conv2d(6, 8, 3, groups=2), {}, "weight", 0),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), {}, "weight", 0),
    "three dimensions": (nn.Conv3d(6, 8, 2), {}, "weight", 0),
    "transposed": (nn.ConvTranspose2d(6, 8, 3), {}, "weight", 1),
    "transposed, depthwise": (nn.ConvTranspose2d(6, 6, 3, groups=6), {}, "weight", None),
    "GPT-2's matrix [in, out]": (Conv1D(8, 6), {}, "weight", 1),
    "embedding": (nn.Embedding(9, 6), {}, "weight", 1),
    "attention [3, out, in]": (nn.MultiheadAttention(8, 2), {}, "in_proj_weight", 1),
    "recurrent [gates, out, in]": (nn.LSTM(5, 8), {}, "weight_ih_l0", 1),
    "fold of the outputs": (nn.Linear(6, 12), {"layer": [3, 4, 6]}, "weight", 1),
    "fold of the inputs": (nn.Linear(6, 8), {"layer": [8, 2, 3]}, "weight", 0),
    "fold across both": (nn.Linear(6, 4), {"layer": [3, 8]}, "weight", None),
}


@pytest.mark.parametrize("kind", OUTPUT_MODES)
def test_the_default_is_zero_along_the_outputs_and_orthonormal_elsewhere(kind):
    layer, fold, name, mode = OUTPUT_MODES[kind]
    config = flora.FloraConfig(target_modules=["layer"], r=4, fold_pattern=fold)
    adapted = peft.get_peft_model(Holder(copy.deepcopy(layer)), config).base_model.model.layer
    core, factors = adapted.core("default", name).detach(), adapted.factors("default", name)
    for n, factor in enumerate(factors):
        if n == mode:
            assert not factor.any()
        elif factor is not None:
            torch.testing.assert_close(factor.T @ factor, torch.eye(factor.shape[1]), atol=1e-5, rtol=0)
    if mode is None:
        assert not core.any()
    else:
        rows = core.movedim(mode, 0).flatten(1)
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-5, rtol=0)


def test_by_default_the_first_gradient_reaches_only_the_output_factor_and_is_that_of_w():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(6, 8, 3).double(), torch.randn(2, 6, 7, 7, dtype=torch.double)
    conv(x).square().sum().backward()
    config = flora.FloraConfig(target_modules=["0"], r=4, scale=3.0)
    layer = peft.get_peft_model(nn.Sequential(copy.deepcopy(conv)), config).double().base_model.model[0]
    layer(x).square().sum().backward()
    core, (out, inward, rows, columns) = layer.core("default"), layer.factors("default")
    assert not any(part.grad.any() for part in (core, inward, rows, columns))
    expected = 3 * torch.einsum("oixy,abcd,ib,xc,yd->oa", conv.weight.grad, core, inward, rows, columns)
    torch.testing.assert_close(out.grad, expected)
