"""Quantised layers of bitsandbytes, torchao, optimum-quanto and torch.ao: LoRA's way with them, and no worse."""

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flora
from flora.adapters import FloraLayer

pytestmark = pytest.mark.compat


class Net(nn.Module):
    """A layer that is quantised between two that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(128, 128), nn.Linear(128, 64), nn.Linear(64, 8)

    def forward(self, x):
        return self.after(torch.tanh(self.layer(torch.tanh(self.before(x)))))


def bnb4(net, compute_dtype=torch.float32):
    bnb = pytest.importorskip("bitsandbytes")
    own = net.layer
    net.layer = bnb.nn.Linear4bit(128, 64, compute_dtype=compute_dtype, quant_type="nf4")
    net.layer.weight = bnb.nn.Params4bit(own.weight.data, requires_grad=False, quant_type="nf4")
    net.layer.bias = own.bias
    net.layer.to("cpu")


def bnb8(net):
    bnb = pytest.importorskip("bitsandbytes")
    own = net.layer
    net.layer = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False)
    net.layer.weight = bnb.nn.Int8Params(own.weight.data.half(), requires_grad=False, has_fp16_weights=False)
    net.layer.bias = own.bias
    net.layer.to("cpu")


def torchao(config):
    def quantise(net):
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(net, getattr(quantization, config)(), lambda m, name: name.split(".")[-1] == "layer")

    return quantise


def torchao_below(net):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig(), lambda m, name: name.endswith("layer.base_layer"))


def quanto(kind, frozen=True):
    def quantise(net):
        library = pytest.importorskip("optimum.quanto")
        library.quantize(net, weights=getattr(library, kind), include=["*layer", "*base_layer"])
        if frozen:
            library.freeze(net)

    return quantise


def dynamic(net):
    torch.ao.quantization.quantize_dynamic(net, {"layer": torch.ao.quantization.default_dynamic_qconfig}, inplace=True)


QUANTISERS = {
    "bitsandbytes nf4": bnb4,
    "bitsandbytes int8": bnb8,
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao intx": torchao("IntxWeightOnlyConfig"),
    "torchao float8": torchao("Float8WeightOnlyConfig"),
    "quanto qint8": quanto("qint8"),
    "quanto qint4": quanto("qint4"),
    "quanto qfloat8": quanto("qfloat8"),
    "quanto qint8, not frozen": quanto("qint8", frozen=False),
    "torch.ao dynamic": dynamic,
}
every = pytest.mark.parametrize("quantiser", QUANTISERS)
BACKWARD = [name for name in QUANTISERS if name != "torch.ao dynamic"]  # which has no gradient of its own


def quantised(name, **settings):
    torch.manual_seed(0)
    net = Net().requires_grad_(False)
    QUANTISERS[name](net)
    base = net.layer
    settings = {"target_modules": ["layer"], "r": 4, "scale": 2.0, "init_weights": False} | settings
    model = peft.get_peft_model(net, flora.FloraConfig(**settings))
    return model, model.base_model.model.layer, base


@every
@pytest.mark.parametrize("form", ["auto", "factored", "merged"])
def test_output_is_that_of_the_quantised_layer_plus_the_update(quantiser, form):
    model, layer, base = quantised(quantiser, forward=form)
    assert isinstance(layer, FloraLayer)
    net, x = model.base_model.model, torch.randn(5, 128)
    hidden = torch.tanh(net.before(x))
    out, core, into = layer.factors("default")[0], layer.core("default"), layer.factors("default")[1]
    update = 2 * out @ core @ into.mT
    expected = net.after(torch.tanh(base(hidden) + hidden @ update.mT))
    torch.testing.assert_close(model(x), expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), net.after(torch.tanh(base(hidden))))


@pytest.mark.parametrize("quantiser", BACKWARD)
def test_gradients_of_three_steps_are_those_of_lora_in_the_same_place(quantiser):
    """FLoRA's matrix U G V^T and LoRA's B A = U G V^T: the gradients of U G and V agree, as the input's do."""
    model, layer, _ = quantised(quantiser)
    torch.manual_seed(0)
    net = Net().requires_grad_(False)
    QUANTISERS[quantiser](net)
    lora = peft.get_peft_model(net, peft.LoraConfig(target_modules=["layer"], r=4, lora_alpha=8, lora_dropout=0.0))
    there = lora.base_model.model.layer
    for step in range(3):
        x = torch.randn(5, 128, generator=torch.Generator().manual_seed(step))
        out, into = layer.factors("default")
        core = layer.core("default")
        with torch.no_grad():
            there.lora_B["default"].weight.copy_(out @ core)
            there.lora_A["default"].weight.copy_(into.mT)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        outputs = model(ours), lora(theirs)
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.square().mean().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
        b, a = there.lora_B["default"].weight.grad, there.lora_A["default"].weight.grad
        torch.testing.assert_close(into.grad, a.mT)
        torch.testing.assert_close(core.grad, out.mT @ b)
        torch.testing.assert_close(out.grad, b @ core.mT)
        with torch.no_grad():
            for parameter in (core, out, into):
                parameter -= 0.1 * parameter.grad
        model.zero_grad()
        lora.zero_grad()


@pytest.mark.parametrize("quantiser", BACKWARD)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(quantiser, autocast):
    model, layer, base = quantised(quantiser)
    x = torch.randn(5, 128)
    expected = base(x) + x @ layer.get_delta_weight("default").mT
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = layer(x)
        output.float().sum().backward()
    torch.testing.assert_close(output.float(), expected.float(), rtol=0, atol=0.05 * expected.abs().max().item())
    assert all(p.grad.dtype == torch.float32 for n, p in model.named_parameters() if ".tucker_" in n)


def test_bfloat16_compute_with_single_precision_adapters():
    torch.manual_seed(0)
    net = Net().requires_grad_(False).bfloat16()
    bnb4(net, torch.bfloat16)
    model = peft.get_peft_model(net, flora.FloraConfig(target_modules=["layer"], r=4, init_weights=False))
    layer, x = model.base_model.model.layer, torch.randn(5, 128, dtype=torch.bfloat16)
    assert layer.core("default").dtype == torch.float32
    output = layer(x)
    assert output.dtype == torch.bfloat16
    expected = net.layer.base_layer(x).float() + x.float() @ layer.get_delta_weight("default").mT
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=0.03 * expected.abs().max().item())
    model(x).float().sum().backward()
    assert layer.core("default").grad.abs().max() > 0


@every
def test_merging_is_refused_and_leaves_the_model_as_it_was(quantiser):
    model, _, _ = quantised(quantiser, target_modules=["before", "layer"])
    x = torch.randn(5, 128)
    expected = model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ValueError, match=r"^layer\.weight: a quantised weight .* reload the model in full precision"
        ):
            merge()
    torch.testing.assert_close(model(x), expected)
    assert not model.base_model.model.before.merged


@every
@pytest.mark.parametrize("settings", [{"init": "hosvd"}, {"use_dora": True}])
def test_what_needs_the_numbers_is_refused(quantiser, settings):
    with pytest.raises(ValueError, match=r"needs a floating-point weight, layer\.weight is "):
        quantised(quantiser, **settings)


@every
def test_reading_the_weight(quantiser):
    _, layer, _ = quantised(quantiser)
    assert layer.weight is layer.base_layer.weight or quantiser == "torch.ao dynamic"
    assert (layer.in_features, layer.out_features) == (128, 64)


@pytest.mark.parametrize(
    "quantise",
    [torchao_below, quanto("qint8"), quanto("qint4"), quanto("qint8", frozen=False)],
    ids=["torchao", "quanto qint8", "quanto qint4", "quanto, not frozen"],
)
def test_quantising_a_model_that_carries_adapters(quantise):
    torch.manual_seed(0)
    config = flora.FloraConfig(target_modules=["layer"], r=4, scale=2.0, init_weights=False)
    model = peft.get_peft_model(Net().requires_grad_(False), config)
    layer, x = model.base_model.model.layer, torch.randn(5, 128)
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if ".tucker_" in name}
    update = layer.get_delta_weight("default").detach()
    model(x)
    quantise(model)
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters() if ".tucker_" in name)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + F.linear(x, update))
    model(x).sum().backward()
    assert layer.core("default").grad.abs().max() > 0
    with pytest.raises(ValueError, match="reload the model in full precision"):
        model.merge_and_unload()


@pytest.mark.parametrize("form", ["auto", "factored"])
@pytest.mark.parametrize("kind", ["qint8", "qint4"])
def test_a_quantised_convolution(form, kind):
    library = pytest.importorskip("optimum.quanto")
    net = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1)).requires_grad_(False)
    library.quantize(net, weights=getattr(library, kind))
    library.freeze(net)
    base, x = net[0], torch.randn(2, 8, 6, 6)
    config = flora.FloraConfig(target_modules=["0"], r=4, init_weights=False, forward=form)
    model = peft.get_peft_model(net, config)
    update = model.base_model.model[0].get_delta_weight("default")
    torch.testing.assert_close(model(x), base(x) + F.conv2d(x, update, padding=1))
    with pytest.raises(ValueError, match="reload the model in full precision"):
        model.merge_and_unload()
