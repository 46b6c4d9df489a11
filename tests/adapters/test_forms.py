"""The forms of one update, and what acts on them: dropout, magnitudes, precision, checkpointing, compilation."""

import copy
from typing import Any

import peft
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import flora
from flora.adapters import FloraLayer

from .layer_cases import Holder


def adapt(model: nn.Module, **settings: Any) -> peft.PeftModel:
    settings = {"target_modules": ["layer"], "r": 3, "init_weights": False} | settings
    return peft.get_peft_model(copy.deepcopy(model), flora.FloraConfig(**settings))


def adapter(model: peft.PeftModel) -> FloraLayer:
    return next(module for module in model.modules() if isinstance(module, FloraLayer))


class Small(nn.Module):
    """A convolution (whose own form differs between factored and merged), a depthwise one, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.fc1, self.fc2 = nn.Linear(6, 40), nn.Linear(40, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(torch.tanh(self.conv(x))).mean((2, 3))
        return self.fc2(torch.tanh(self.fc1(x)))


ALL = ["conv", "depthwise", "fc1", "fc2"]


def test_training_curves_agree_between_forms():
    torch.set_default_dtype(torch.float64)
    try:
        base, x, y = Small(), torch.randn(8, 3, 6, 6), torch.randint(4, (8,))
        curves = {}
        for form in ("factored", "merged", "auto"):
            torch.manual_seed(5)
            model = adapt(base, target_modules=ALL, forward=form, init_weights=True)
            optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            losses = []
            for _ in range(50):
                loss = F.cross_entropy(model(x), y)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                losses.append(loss.item())
            curves[form] = torch.tensor(losses)
        assert curves["merged"][-1] < 0.99 * curves["merged"][0]
        for form in ("factored", "auto"):
            torch.testing.assert_close(curves[form], curves["merged"], rtol=1e-8, atol=0)
    finally:
        torch.set_default_dtype(torch.float32)


def test_auto_takes_the_thin_products_for_wide_matrices_only():
    wide, narrow = nn.Linear(512, 512), nn.Linear(8, 8)
    assert adapter(adapt(Holder(wide))).form_for(["default"]) == "factored"
    assert adapter(adapt(Holder(narrow))).form_for(["default"]) == "merged"


@pytest.mark.parametrize("form", ["factored", "merged"])
def test_transposed_convolutions_take_the_output_size(form):
    layer = nn.ConvTranspose2d(3, 4, 3, stride=3)
    model = adapt(Holder(layer), forward=form)
    x = torch.randn(1, 3, 4, 4)
    weight = layer.weight + adapter(model).get_delta_weight("default")
    expected = F.conv_transpose2d(x, weight, layer.bias, stride=3, output_padding=(2, 1))
    actual = adapter(model)(x, output_size=[14, 13])
    assert actual.shape == (1, 4, 14, 13)
    torch.testing.assert_close(actual, expected)


# ---------------------------------------------------------------------- dropout


@pytest.mark.parametrize(
    ("layer", "x", "op"),
    [
        (nn.Linear(6, 5), torch.randn(4, 6), F.linear),
        (nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 6, 6), lambda x, w: F.conv2d(x, w, padding=1)),
        (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 6, 6), lambda x, w: F.conv2d(x, w, groups=2)),
        (nn.Conv1d(4, 4, 3, groups=4), torch.randn(2, 4, 9), lambda x, w: F.conv1d(x, w, groups=4)),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), torch.randn(2, 4, 9), lambda x, w: F.conv_transpose1d(x, w, groups=2)),
        (
            timm.layers.Conv2dSame(4, 6, 3, stride=2, bias=True),
            torch.randn(2, 4, 8, 8),
            lambda x, w: F.conv2d(F.pad(x, (0, 1, 0, 1)), w, stride=2),
        ),
    ],
)
def test_dropout_acts_on_the_input_of_the_update(layer, x, op):
    model = adapt(Holder(layer), flora_dropout=0.5).train()
    torch.manual_seed(9)
    actual = model(x)
    torch.manual_seed(9)
    expected = layer(x) + op(F.dropout(x, 0.5), adapter(model).get_delta_weight("default"))
    torch.testing.assert_close(actual, expected)
    model.eval()
    torch.testing.assert_close(model(x), layer(x) + op(x, adapter(model).get_delta_weight("default")))


def test_embedding_drops_the_rows_it_looked_up():
    model = adapt(Holder(nn.Embedding(5, 8)), flora_dropout=0.5).train()
    layer = adapter(model)
    ids = torch.tensor([[0, 1], [4, 4]])
    torch.manual_seed(9)
    actual = model(ids)
    rows, dimension = layer.factors("default")
    torch.manual_seed(9)
    expected = F.dropout(rows[ids], 0.5) @ (layer.core("default") * layer.scaling["default"]) @ dimension.T
    torch.testing.assert_close(actual - layer.base_layer(ids), expected)


@pytest.mark.parametrize("kind", [{"padding_idx": 1}, {"scale_grad_by_freq": True}])
def test_every_form_of_an_embedding_trains_by_the_rows_that_torch_trains(kind):
    model, ids = adapt(Holder(nn.Embedding(5, 8, **kind))), torch.tensor([[0, 1], [4, 4], [1, 3]])
    layer = adapter(model)
    core, (rows, columns) = layer.core("default"), layer.factors("default")
    weight = layer.base_layer.weight + torch.einsum("ab,ia,jb->ij", core, rows, columns)
    expected = torch.autograd.grad(F.embedding(ids, weight, **kind).sin().sum(), [core, rows, columns])
    for form in ("auto", "factored", "merged"):
        layer.configured_form["default"] = form
        actual = torch.autograd.grad(model(ids).sin().sum(), [core, rows, columns])
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_weight_that_a_hook_computes_is_refused(norm):
    model = Holder(norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"^layer: its weight is computed anew by a hook .*parametrizations$"):
        peft.get_peft_model(model, flora.FloraConfig(target_modules=["layer"]))


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(), self.bias)


@pytest.mark.parametrize("layer", [nn.MultiheadAttention(4, 2), nn.LSTM(4, 3), nn.GRUCell(4, 3), OwnForward(4, 3)])
def test_layers_whose_update_has_no_input_of_its_own_reject_dropout(layer):
    with pytest.raises(ValueError, match=r"^flora_dropout: layer .* set it to 0$"):
        adapt(Holder(layer), flora_dropout=0.1)


def test_bare_parameters_reject_dropout():
    with pytest.raises(ValueError, match="flora_dropout"):
        adapt(Holder(nn.Bilinear(3, 4, 5)), target_modules=None, target_parameters=["layer.weight"], flora_dropout=0.1)


def test_layers_with_a_forward_of_their_own_keep_it():
    layer = OwnForward(6, 5)
    model = adapt(Holder(layer))
    weight = layer.weight + adapter(model).get_delta_weight("default")
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), F.linear(x, weight / weight.norm(), layer.bias))


# ---------------------------------------------------------------------- magnitudes


@pytest.mark.parametrize(
    ("layer", "x", "dims"),
    [
        (nn.Linear(6, 5), torch.randn(4, 6), (1,)),
        (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 6, 6), (1, 2, 3)),
        (nn.ConvTranspose1d(4, 6, 3), torch.randn(2, 4, 9), (0, 2)),
        (nn.Embedding(7, 4), torch.arange(7), (0,)),
    ],
)
def test_magnitude_times_direction_with_the_norm_held_constant(layer, x, dims):
    model = adapt(Holder(layer), use_dora=True)
    adapted = adapter(model)
    magnitude = adapted.tucker_magnitude["default"]["weight"]
    magnitude.data.mul_(torch.rand_like(magnitude) + 0.5)
    parameters = [adapted.core("default"), *(f for f in adapted.factors("default") if f is not None), magnitude]
    actual = torch.autograd.grad(model(x).square().sum(), parameters)

    updated = adapted.base_layer.weight + adapted.get_delta_weight("default")
    norm = torch.linalg.vector_norm(updated.detach(), dim=dims, keepdim=True)
    weight = magnitude.view(norm.shape) * updated / norm
    output = torch.func.functional_call(adapted.base_layer, {"weight": weight}, (x,))
    torch.testing.assert_close(model(x), output)
    expected = torch.autograd.grad(output.square().sum(), parameters)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_weights_without_outputs_of_their_own_reject_magnitudes():
    with pytest.raises(ValueError, match="use_dora"):
        adapt(Holder(nn.Bilinear(3, 4, 5)), target_modules=None, target_parameters=["layer.weight"], use_dora=True)
    with pytest.raises(ValueError, match="use_dora: layer is a grouped transposed"):
        adapt(Holder(nn.ConvTranspose1d(4, 4, 3, groups=2)), use_dora=True)


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["factored", "merged"])
def test_single_precision_adapters_on_a_half_precision_model(dtype, form):
    base, x = Small(), torch.randn(4, 3, 6, 6)
    reference = adapt(base, target_modules=ALL, forward=form).eval()
    model = adapt(copy.deepcopy(base).to(dtype), target_modules=ALL, forward=form).eval()
    model.load_state_dict({k: v for k, v in reference.state_dict().items() if ".tucker_" in k}, strict=False)
    assert {p.dtype for n, p in model.named_parameters() if ".tucker_" in n} == {torch.float32}
    output = model(x.to(dtype))
    assert output.dtype == dtype
    tolerance = 16 * torch.finfo(dtype).eps * reference(x).abs().max().item()
    torch.testing.assert_close(output.float(), reference(x), rtol=0, atol=tolerance)
    if form == "merged":
        merged = model.merge_and_unload()
        assert torch.equal(merged(x.to(dtype)), output)
        assert {p.dtype for p in merged.parameters()} == {dtype}


def test_autocast():
    model, x = adapt(Small(), target_modules=ALL), torch.randn(4, 3, 6, 6)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    assert output.dtype == torch.bfloat16
    tolerance = 16 * torch.finfo(torch.bfloat16).eps * expected.abs().max().item()
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=tolerance)
    output.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


# ---------------------------------------------------------------------- checkpointing and compilation


def test_gradient_checkpointing_gives_the_same_gradients():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=20))
    experts = ["mlp.gate_proj.weight"]
    ids = torch.randint(20, (2, 6))
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = adapt(base, target_modules=["q_proj", "down_proj"], target_parameters=experts).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], gradient)


def test_generation_reads_adapted_weights():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=20)).eval()
    model = adapt(base, target_modules="all-linear", r=8, scale=30.0, task_type="CAUSAL_LM").eval()
    ids = torch.randint(3, 20, (2, 4))
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(input_ids=ids, **settings)
    assert not torch.equal(generated, base.generate(input_ids=ids, **settings))
    assert torch.equal(generated, model.merge_and_unload().generate(input_ids=ids, **settings))
