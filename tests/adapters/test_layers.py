"""Every layer type against independent oracles: tensorly for updates, the op itself with W + update for outputs."""

import copy
import warnings
from typing import Any

import hypothesis
import numpy as np
import peft
import pytest
import tensorly
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from flora.adapters import FloraLayer

from .layer_cases import LAYERS, Case, Holder

EXAMPLES = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
every_layer = pytest.mark.parametrize("kind", LAYERS)


def wrap(case: Case) -> tuple[Any, FloraLayer]:
    """The case's layer as a PEFT model, with a random (non-zero) adapter in the layer's dtype."""
    config = copy.deepcopy(case.config)
    if case.target_parameters:
        config.target_parameters = ["layer.experts"]
    else:
        config.target_modules = ["layer"]
    config.init_weights = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = peft.get_peft_model(Holder(case.layer), config).eval()
    return model, next(module for module in model.modules() if isinstance(module, FloraLayer))


def tensorly_delta(layer: FloraLayer, weight: str) -> np.ndarray:
    """The update by tensorly, from the adapter's parameters; identity factors for the modes that have none."""
    core = layer.core("default", weight).detach().numpy()
    factors = [
        np.eye(core.shape[mode]) if factor is None else factor.detach().numpy()
        for mode, factor in enumerate(layer.factors("default", weight))
    ]
    full = tensorly.tucker_to_tensor((core, factors)) * layer.scaling["default"]
    return full.reshape(layer.weights["default"][weight].weight_shape)


def with_updated_weights(base: nn.Module, layer: FloraLayer) -> nn.Module:
    """A copy of the base layer whose stored weights are W + tensorly's update."""
    updated = copy.deepcopy(base)
    for name in layer.weights["default"]:
        updated.get_parameter(name).data += torch.from_numpy(tensorly_delta(layer, name)).to(torch.get_default_dtype())
    return updated


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


@every_layer
@EXAMPLES
@hypothesis.given(data=st.data(), seed=st.integers(0, 2**16))
def test_output_is_the_base_op_with_the_updated_weight(kind, data, seed):
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float64)
    try:
        case = LAYERS[kind](data.draw)
        base = copy.deepcopy(case.layer)
        model, layer = wrap(case)
        for name in layer.weights["default"]:
            delta = layer.get_delta_weight("default", name).detach().numpy()
            expected = tensorly_delta(layer, name)
            assert np.abs(delta - expected).max() <= 1e-10 * np.abs(expected).max()
        expected = Holder(with_updated_weights(base, layer))(*case.args)
        assert relative_error(model(*case.args), expected) < 1e-10
        with torch.no_grad():  # torch's fused kernels for inference read the weights elsewhere
            assert relative_error(model(*case.args), expected) < 1e-10
    finally:
        torch.set_default_dtype(torch.float32)


@every_layer
@EXAMPLES
@hypothesis.given(data=st.data(), seed=st.integers(0, 2**16))
def test_merged_module_gives_the_same_output(kind, data, seed):
    torch.manual_seed(seed)
    case = LAYERS[kind](data.draw)
    base = copy.deepcopy(case.layer)
    model, layer = wrap(case)
    model.merge_adapter()
    model.unmerge_adapter()
    for name in layer.weights["default"]:
        torch.testing.assert_close(layer.base_weight(name), base.get_parameter(name), rtol=1e-5, atol=1e-5)
    adapted = model(*case.args)
    model.merge_adapter()
    assert relative_error(model(*case.args), adapted) < 1e-5
    merged = model.merge_and_unload()
    assert type(merged.layer) is type(base)
    assert [name for name, _ in merged.layer.named_parameters()] == [name for name, _ in base.named_parameters()]
    assert relative_error(merged(*case.args), adapted) < 1e-5


@every_layer
@hypothesis.settings(max_examples=4, deadline=None, derandomize=True)
@hypothesis.given(data=st.data(), seed=st.integers(0, 2**16))
def test_gradients_agree_with_finite_differences(kind, data, seed):
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float64)
    try:
        case = LAYERS[kind](data.draw)
        if getattr(case.layer, "max_norm", None) is not None:
            case.layer.max_norm = None  # renormalises rows in place without a gradient, in torch's own op
        if getattr(case.layer, "padding_idx", None) is not None:
            case.layer.padding_idx = None  # torch gives that row no gradient, although the output depends on it
        model, _ = wrap(case)
        parameters = [p for p in model.parameters() if p.requires_grad]
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        assert parameters
        assert all(".tucker_" in name for name in names)

        directions = torch.randn_like(model(*case.args))

        def run(*values: Tensor) -> Tensor:
            output = torch.func.functional_call(model, dict(zip(names, values, strict=True)), case.args)
            return (output * directions).sum()

        assert torch.autograd.gradcheck(run, parameters)
    finally:
        torch.set_default_dtype(torch.float32)


@every_layer
@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(data=st.data(), seed=st.integers(0, 2**16))
def test_reading_the_weight_gives_the_adapted_weight(kind, data, seed):
    torch.manual_seed(seed)
    case = LAYERS[kind](data.draw)
    base = copy.deepcopy(case.layer)
    model, layer = wrap(case)
    for name in layer.weights["default"]:
        if "." in name:
            continue  # a weight of a part of the layer, which is read from the part
        expected = base.get_parameter(name) + layer.get_delta_weight("default", name)
        torch.testing.assert_close(getattr(layer, name), expected)
        with model.disable_adapter():
            assert torch.equal(getattr(layer, name), base.get_parameter(name))
