"""Weights under parametrizations, torch's and one's own: trained as W + update, merged or refused."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import flora
from flora.adapters import FloraLayer

from .layer_cases import Holder


class Squared(nn.Module):
    """A parametrization without an inverse."""

    def forward(self, x: Tensor) -> Tensor:
        return x.square() + 0.1


class Doubled(nn.Module):
    """A parametrization with an exact inverse."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


def own(kind: type[nn.Module]) -> Any:
    return lambda owner, name="weight": parametrize.register_parametrization(owner, name, kind())


NORMS: dict[str, Any] = {
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "cayley": lambda owner, name="weight": parametrizations.orthogonal(
        owner, name, orthogonal_map="cayley", use_trivialization=False
    ),
    "spectral_norm": parametrizations.spectral_norm,
    "without inverse": own(Squared),
    "with inverse": own(Doubled),
}
EXACT = ("weight_norm", "with inverse")

SEQUENCE = torch.randn(5, 2, 6)
LAYERS: dict[str, tuple[nn.Module, str, tuple[Tensor, ...], dict[str, Any]]] = {
    "Linear": (nn.Linear(6, 5), "weight", (torch.randn(4, 6),), {}),
    "Linear factored": (nn.Linear(6, 5), "weight", (torch.randn(4, 6),), {"forward": "factored"}),
    "Linear merged": (nn.Linear(6, 5), "weight", (torch.randn(4, 6),), {"forward": "merged"}),
    "Conv2d": (nn.Conv2d(4, 6, 3), "weight", (torch.randn(2, 4, 6, 6),), {}),
    "Conv1d grouped": (nn.Conv1d(4, 6, 3, groups=2), "weight", (torch.randn(2, 4, 9),), {}),
    "ConvTranspose1d": (nn.ConvTranspose1d(4, 6, 3), "weight", (torch.randn(2, 4, 9),), {}),
    "ConvTranspose2d factored": (
        nn.ConvTranspose2d(4, 6, 3),
        "weight",
        (torch.randn(2, 4, 5, 5),),
        {"forward": "factored"},
    ),
    "Embedding": (nn.Embedding(7, 5), "weight", (torch.arange(7),), {}),
    "Embedding merged": (nn.Embedding(7, 5), "weight", (torch.arange(7),), {"forward": "merged"}),
    "MultiheadAttention": (nn.MultiheadAttention(6, 2), "out_proj.weight", (SEQUENCE,) * 3, {}),
    "MultiheadAttention, projection": (nn.MultiheadAttention(6, 2), "in_proj_weight", (SEQUENCE,) * 3, {}),
    "LSTM": (nn.LSTM(6, 3), "weight_hh_l0", (SEQUENCE,), {}),
    "GRU": (nn.GRU(6, 3), "weight_ih_l0", (SEQUENCE,), {}),
    "LSTMCell": (nn.LSTMCell(6, 3), "weight_hh", (SEQUENCE[0],), {}),
}
every_layer = pytest.mark.parametrize("layer", LAYERS)
every_norm = pytest.mark.parametrize("norm", NORMS)


def parametrised(layer: str, norm: str) -> nn.Module:
    """A copy of the layer in double precision, whose weight is parametrised."""
    torch.manual_seed(1)
    module = copy.deepcopy(LAYERS[layer][0]).double()
    owner, _, attribute = LAYERS[layer][1].rpartition(".")
    NORMS[norm](module.get_submodule(owner), attribute)
    return module


def inputs(layer: str) -> tuple[Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in LAYERS[layer][2])


def adapt(layer: str, norm: str, **settings: Any) -> tuple[Any, Any]:
    settings = {"target_modules": ["layer"], "r": 3, "init_weights": False} | LAYERS[layer][3] | settings
    config = flora.FloraConfig(**settings)
    model = peft.get_peft_model(Holder(parametrised(layer, norm)), config, autocast_adapter_dtype=False).eval()
    return model, next(module for module in model.modules() if isinstance(module, FloraLayer))


def plain(adapted: Any, layer: str, norm: str) -> nn.Module:
    """The base layer with what its parametrization gives, as a plain weight."""
    module = parametrised(layer, norm).eval()  # no copy: that would share the class that the properties live in
    module.load_state_dict(adapted.base_layer.state_dict())
    owner, _, attribute = LAYERS[layer][1].rpartition(".")
    parametrize.remove_parametrizations(module.get_submodule(owner), attribute)
    return module


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@every_layer
@every_norm
def test_output_and_gradients_are_those_of_the_parametrised_weight_plus_the_update(layer, norm):
    model, adapted = adapt(layer, norm)
    base = plain(adapted, layer, norm)
    assert LAYERS[layer][1] in adapted.weights["default"]
    sums = {
        name: base.get_parameter(name) + adapted.get_delta_weight("default", name)
        for name in adapted.weights["default"]
    }
    expected = first(torch.func.functional_call(base, sums, inputs(layer)))
    actual = first(model(*inputs(layer)))
    torch.testing.assert_close(actual, expected)
    parameters = {name: p for name, p in model.named_parameters() if ".tucker_" in name}
    wanted = torch.autograd.grad(expected.sin().sum(), parameters.values())
    actual.sin().sum().backward()
    for (name, parameter), gradient in zip(parameters.items(), wanted, strict=True):
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, gradient)
    with torch.no_grad():  # torch's kernels for inference
        torch.testing.assert_close(first(model(*inputs(layer))), expected)
    with model.disable_adapter():
        torch.testing.assert_close(first(model(*inputs(layer))), first(base(*inputs(layer))))


@every_layer
@every_norm
@pytest.mark.parametrize("safe", [False, True])
def test_merging_is_right_or_refused_with_nothing_changed(layer, norm, safe):
    model, adapted = adapt(layer, norm)
    expected, name = first(model(*inputs(layer))), LAYERS[layer][1]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if norm in EXACT:
        model.merge_adapter(safe_merge=safe)
        assert adapted.merged
        torch.testing.assert_close(first(model(*inputs(layer))), expected)
        model.unmerge_adapter()
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, before[key])
        merged = model.merge_and_unload(safe_merge=safe)
        torch.testing.assert_close(first(merged(*inputs(layer))), expected)
        owner, _, attribute = f"layer.{name}".rpartition(".")
        assert parametrize.is_parametrized(merged.get_submodule(owner), attribute)
        return
    way = rf'^layer\.{name}: its parametrization \(.*remove_parametrizations\(layer, "{name.rpartition(".")[2]}"\)$'
    for merge in (model.merge_adapter, model.merge_and_unload, adapted.merge):
        with pytest.raises(ValueError, match=way):
            merge(safe_merge=safe)
    assert not adapted.merged
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(first(model(*inputs(layer))), expected)


@pytest.mark.parametrize("layer", ["Linear", "ConvTranspose1d", "MultiheadAttention"])
def test_a_refused_merge_leaves_the_layers_before_it_unmerged(layer):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), Holder(parametrised(layer, "orthogonal")))
    targets = r"0|1\.layer"
    model = peft.get_peft_model(net.double(), flora.FloraConfig(target_modules=targets, init_weights=False))
    before = net[0].base_layer.weight.clone()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="remove_parametrizations"):
            merge()
    assert torch.equal(net[0].base_layer.weight, before)
    assert isinstance(net[0], FloraLayer)


@pytest.mark.parametrize("form", ["auto", "factored", "merged"])
@pytest.mark.parametrize("layer", ["Linear", "Conv2d", "ConvTranspose1d", "LSTMCell"])
def test_a_forward_pass_steps_the_power_iteration_once(layer, form):
    model, adapted = adapt(layer, "spectral_norm", forward=form)
    model.train()
    base = parametrised(layer, "spectral_norm").train()
    owner, _, attribute = LAYERS[layer][1].rpartition(".")
    kept = [m.get_submodule(owner).parametrizations[attribute][0] for m in (adapted.base_layer, base)]
    for ours, theirs in zip(*(k.buffers() for k in kept), strict=True):
        ours.copy_(theirs)
    model(*inputs(layer))
    base(*inputs(layer))
    for ours, theirs in zip(*(k.buffers() for k in kept), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layer", ["Linear", "Conv2d", "ConvTranspose1d", "Embedding"])
@pytest.mark.parametrize("norm", ["weight_norm", "orthogonal"])
def test_magnitudes(layer, norm):
    model, adapted = adapt(layer, norm, use_dora=True, forward="auto")
    base, dim = plain(adapted, layer, norm), adapted.weights["default"]["weight"].output_dim
    weight = base.weight + adapted.get_delta_weight("default")
    dims = [d for d in range(weight.dim()) if d != dim]
    size = torch.linalg.vector_norm(base.weight, dim=dims, keepdim=True)
    weight = weight * size / torch.linalg.vector_norm(weight, dim=dims, keepdim=True)
    expected = torch.func.functional_call(base, {"weight": weight}, inputs(layer))
    torch.testing.assert_close(model(*inputs(layer)), expected)


def test_a_trained_base_gets_its_gradients_through_its_parametrization():
    model, adapted = adapt("LSTM", "weight_norm")
    adapted.base_layer.requires_grad_(True)
    first(model(*inputs("LSTM"))).sum().backward()
    originals = adapted.base_layer.parametrizations["weight_hh_l0"]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in originals.parameters())


def test_hooks_and_a_forward_of_its_own_survive():
    seen = []
    model, adapted = adapt("ConvTranspose1d", "weight_norm", forward="merged")
    base, x = adapted.base_layer, inputs("ConvTranspose1d")
    expected = model(*x)
    base.register_forward_hook(lambda module, args, output: seen.append(module.weight) or 2 * output)
    torch.testing.assert_close(model(*x), 2 * expected)
    torch.testing.assert_close(seen[0], base.weight + adapted.get_delta_weight("default"))
    assert isinstance(base.parametrizations["weight"], nn.Module)
