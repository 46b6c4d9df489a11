"""Adapters of quantised layers: the layer's own output plus the update's, and nothing that would be rounded away."""

import copy
import re
from contextlib import nullcontext

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flora
from flora.adapters import FloraLayer

from .layer_cases import Holder
from .quantised import FLOAT8, LINEAR, Rounded, dequantised, rounded

kinds = pytest.mark.parametrize("kind", LINEAR)


def adapt(layer, **settings):
    settings = {"target_modules": ["layer"], "r": 3, "init_weights": False, "scale": 2.0} | settings
    model = peft.get_peft_model(Holder(layer), flora.FloraConfig(**settings))
    return model, next(module for module in model.modules() if isinstance(module, FloraLayer))


def by_hand(core, factors):
    """The update: the core, 2 being the scale, times the factor of each mode that has one."""
    modes, sizes = "abcde"[: core.dim()], "vwxyz"
    present = [(mode, factor) for mode, factor in enumerate(factors) if factor is not None]
    terms = ",".join([modes, *(sizes[mode] + modes[mode] for mode, _ in present)])
    result = "".join(modes[mode] if factor is None else sizes[mode] for mode, factor in enumerate(factors))
    return 2 * torch.einsum(f"{terms}->{result}", core, *(factor for _, factor in present))


@kinds
@pytest.mark.parametrize("form", ["auto", "factored", "merged"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_output_and_gradients_are_those_of_the_dequantised_weight_plus_the_update(kind, form, dropout):
    base = LINEAR[kind](nn.Linear(6, 5))
    model, layer = adapt(base, forward=form, flora_dropout=dropout)
    model.eval()
    x = torch.randn(4, 6, requires_grad=True)
    core, factors = layer.core("default"), layer.factors("default")
    expected = F.linear(x, dequantised(base) + by_hand(core, factors), base.bias)
    output = model(x)
    torch.testing.assert_close(output, expected)
    wanted = [x, core, *factors]
    actual = torch.autograd.grad(output.sin().sum(), wanted)
    for ours, theirs in zip(actual, torch.autograd.grad(expected.sin().sum(), wanted), strict=True):
        torch.testing.assert_close(ours, theirs)


@kinds
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_around_single_precision_adapters(kind, autocast):
    own = not autocast and kind == "tensor subclass"  # computes in the dtype of what it was made of
    base = LINEAR[kind](nn.Linear(6, 5, dtype=torch.bfloat16 if own else torch.float32))
    model, layer = adapt(base)
    assert {p.dtype for n, p in model.named_parameters() if ".tucker_" in n} == {torch.float32}
    x = torch.randn(4, 6)
    core, factors = layer.core("default"), layer.factors("default")
    expected = F.linear(x, dequantised(base).float() + by_hand(core, factors), base.bias.float())
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        output = model(x if autocast else x.bfloat16())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=0.03 * expected.abs().max().item())
    output.float().sum().backward()
    assert all(p.grad.abs().max() > 0 and p.grad.dtype == torch.float32 for p in (core, *factors))


@kinds
def test_merging_is_refused_before_anything_changes(kind):
    net = nn.Sequential(nn.Linear(6, 6), nn.Sequential(LINEAR[kind](nn.Linear(6, 5))))
    model = peft.get_peft_model(net, flora.FloraConfig(target_modules=["0", "1.0"], init_weights=False))
    before, x = copy.deepcopy(model.state_dict()), torch.randn(3, 6)
    expected = model(x)
    way = r"^1\.0\.weight: a quantised weight \([\w.]+\) cannot be merged into; reload the model in full precision.*$"
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_adapter(safe_merge=True)):
        with pytest.raises(ValueError, match=way):
            merge()
    with pytest.raises(ValueError, match=way):
        model.base_model.model[1][0].merge()
    torch.testing.assert_close(model(x), expected)
    for name, value in model.state_dict().items():
        same = value.codes == before[name].codes if isinstance(value, Rounded) else value == before[name]
        assert same.all(), name


@kinds
def test_reading_the_weight_gives_what_the_layer_keeps(kind):
    base = LINEAR[kind](nn.Linear(6, 5))
    model, layer = adapt(base)
    if kind == "packed":
        with pytest.raises(AttributeError, match="no attribute 'weight'"):
            _ = layer.weight
    else:
        assert layer.weight is base.weight
    assert (layer.in_features, layer.out_features) == (6, 5)
    with model.disable_adapter():
        assert torch.equal(model(torch.eye(6)), base(torch.eye(6)))
    assert model.unload().layer is base


@kinds
@pytest.mark.parametrize(
    ("settings", "message"),
    [({"init": "hosvd"}, "init: hosvd needs a floating"), ({"use_dora": True}, "use_dora: needs a floating")],
)
def test_what_needs_the_numbers_is_refused(kind, settings, message):
    with pytest.raises(ValueError, match=rf"^{message}.*, layer\.weight is .*$"):
        adapt(LINEAR[kind](nn.Linear(6, 5)), **settings)


@kinds
def test_two_adapters_add_up(kind):
    base = LINEAR[kind](nn.Linear(6, 5))
    model, layer = adapt(base)
    model.add_adapter("second", flora.FloraConfig(target_modules=["layer"], r=2, init_weights=False, forward="merged"))
    model.base_model.set_adapter(["default", "second"])
    x = torch.randn(4, 6)
    total = sum(layer.get_delta_weight(name) for name in ("default", "second"))
    torch.testing.assert_close(model(x), F.linear(x, dequantised(base) + total, base.bias))


@kinds
def test_quantising_after_wrapping(kind):
    linear = nn.Linear(6, 5)
    model, layer = adapt(linear)
    x = torch.randn(4, 6)
    model(x)
    layer.base_layer = LINEAR[kind](linear)  # as quantisers replace modules that they find
    core, factors = layer.core("default"), layer.factors("default")
    expected = F.linear(x, dequantised(layer.base_layer) + by_hand(core, factors), linear.bias)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("layer", "settings"),
    [(nn.Linear(6, 6), {"use_dora": True}), (nn.LSTMCell(6, 6), {}), (nn.MultiheadAttention(6, 2), {})],
)
def test_layers_without_a_form_apart_say_so_when_quantised_after_wrapping(layer, settings):
    model, adapted = adapt(layer, **settings)
    name = next(iter(adapted.weights["default"]))
    rounded(layer, name)
    inputs = (torch.randn(4, 6),) * (3 if isinstance(layer, nn.MultiheadAttention) else 1)
    with pytest.raises(ValueError, match=rf"^layer\.{name}: a quantised weight \(Rounded\), which .* be added to; .*$"):
        model(*inputs)


@pytest.mark.parametrize("layer", [nn.LSTM(4, 3), nn.GRUCell(4, 3), nn.MultiheadAttention(4, 2)])
@pytest.mark.parametrize("dtype", [torch.int8, FLOAT8])
def test_layers_without_a_form_apart_are_refused_when_wrapped(layer, dtype):
    layer = copy.deepcopy(layer)
    name = next(name for name, _ in layer.named_parameters() if "weight" in name)
    layer._parameters[name] = nn.Parameter(layer._parameters[name].detach().to(dtype), requires_grad=False)
    with pytest.raises(
        ValueError, match=rf"^layer: a quantised {type(layer).__name__} cannot be adapted; leave it out"
    ):
        adapt(layer)


def test_bare_quantised_parameters_are_refused():
    owner = nn.Bilinear(3, 4, 5)
    owner.weight = nn.Parameter(owner.weight.detach().to(FLOAT8), requires_grad=False)
    with pytest.raises(ValueError, match=r"^layer: a quantised Bilinear cannot be adapted"):
        adapt(owner, target_modules=None, target_parameters=["layer.weight"])


def unpacking(kind):
    """A class whose own forward unpacks its integer weight and then does what its kind does."""

    class Unpacking(kind):
        def forward(self, *args):
            return torch.func.functional_call(self.kept, {"weight": self.weight * self.step}, args)

    def build(layer):
        quantised = copy.deepcopy(layer)
        quantised.__class__ = Unpacking
        weight = Rounded.of(layer.weight)
        quantised.__dict__["kept"], quantised.step = layer, weight.step
        quantised.weight = nn.Parameter(weight.codes, requires_grad=False)
        return quantised

    return build


IMAGE = torch.randn(2, 4, 6, 6)
OTHERS = {
    "Conv2d": (nn.Conv2d(4, 6, 3, padding=1), IMAGE, lambda x, w: F.conv2d(x, w, padding=1)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), IMAGE, lambda x, w: F.conv2d(x, w, groups=2)),
    "Conv1d": (nn.Conv1d(4, 6, 3), IMAGE[..., 0], F.conv1d),
    "ConvTranspose2d": (
        nn.ConvTranspose2d(4, 6, 3, stride=2),
        IMAGE,
        lambda x, w: F.conv_transpose2d(x, w, stride=2),
    ),
    "Embedding": (nn.Embedding(7, 5), torch.arange(7), F.embedding),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("way", ["tensor subclass", "own forward"])
@pytest.mark.parametrize("form", ["auto", "factored", "merged"])
def test_convolutions_and_embeddings(case, way, form):
    layer, x, op = OTHERS[case]
    base = rounded(copy.deepcopy(layer)) if way == "tensor subclass" else unpacking(type(layer))(layer)
    model, adapted = adapt(base, forward=form)
    core, factors = adapted.core("default"), adapted.factors("default")
    expected = base(x) + op(x, by_hand(core, factors))
    output = model(x)
    torch.testing.assert_close(output, expected)
    (actual,), (gradient,) = (torch.autograd.grad(y.sin().sum(), core) for y in (output, expected))
    rounding = 1e-5 * gradient.abs().max().item()  # of sums in float32, in another order
    torch.testing.assert_close(actual, gradient, rtol=1e-5, atol=rounding)
    with pytest.raises(ValueError, match=r"layer\.weight: a quantised weight .* cannot be merged into"):
        model.merge_and_unload()


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)


def test_a_quantised_convolution_that_does_more_with_its_weight_is_refused():
    with pytest.raises(ValueError, match="layer: a quantised Standardised cannot be adapted"):
        adapt(rounded(Standardised(4, 6, 3)))


class Scaled(nn.Embedding):
    embed_scale = 3.7

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


def test_the_scale_of_an_embedding_is_not_rounded_to_the_dtype_of_its_weight():
    layer = Scaled(7, 5, dtype=torch.bfloat16)
    _, adapted = adapt(layer, forward="factored")
    delta = adapted.get_delta_weight("default")
    assert delta.dtype == torch.float32
    torch.testing.assert_close(adapted.delta_output("default", torch.arange(7)), 3.7 * delta, rtol=1e-6, atol=1e-6)


def test_other_layers_without_a_weight_are_still_refused():
    class Odd(nn.Module):
        in_features = out_features = 4

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.register_buffer("positions", torch.arange(4))

    for layer in (Odd(), nn.ReLU()):
        with pytest.raises(ValueError, match=re.escape(f"layer is a {type(layer).__name__}, which is not supported")):
            adapt(layer)


class Tagged(nn.Parameter):
    """A subclass that says nothing about how it computes."""


def test_a_subclass_that_computes_as_a_plain_tensor_does_is_merged():
    layer = nn.Linear(6, 5)
    layer.weight = Tagged(layer.weight.detach())
    model, adapted = adapt(layer)
    expected = layer.weight + adapted.get_delta_weight("default")
    torch.testing.assert_close(model.merge_and_unload().layer.weight.detach(), expected.detach())
