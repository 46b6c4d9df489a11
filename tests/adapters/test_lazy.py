"""The weight of an adapted layer as others read it: W + delta wherever its values go, and never written to."""

import copy
import pickle

import peft
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
import transformers
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import flora
from flora.adapters import FloraLayer


@pytest.fixture
def model() -> peft.PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    return peft.get_peft_model(base, flora.FloraConfig(r=3, scale=2.0, init_weights=False, target_modules=["0"]))


@pytest.fixture
def layer(model) -> FloraLayer:
    return model.base_model.model[0]


def by_hand(layer: FloraLayer) -> Tensor:
    core, (rows, columns) = layer.core("default"), layer.factors("default")
    return layer.base_layer.weight + 2.0 * torch.einsum("ij,oi,cj->oc", core, rows, columns)


def builds(layer: FloraLayer, monkeypatch) -> list[str]:
    made: list[str] = []
    add = type(layer).add_delta
    monkeypatch.setattr(type(layer), "add_delta", lambda *args: made.append(args[2]) or add(*args))
    return made


@pytest.mark.parametrize("name", ["dtype", "device", "shape", "ndim", "is_cuda", "requires_grad", "layout"])
def test_looking_at_it_does_not_build_it(layer, name, monkeypatch):
    expected, made = getattr(by_hand(layer), name), builds(layer, monkeypatch)
    assert getattr(layer.weight, name) == expected
    assert layer.weight.size(0) == len(layer.weight) == 5
    assert not made
    assert layer.weight.sum() != 0
    assert made == ["default"]


def test_t5_builds_each_weight_once(monkeypatch):
    """Its layers ask for wo.weight.dtype in every pass."""
    config = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, vocab_size=40, decoder_start_token_id=0
    )
    settings = flora.FloraConfig(target_modules=["wo"], init_weights=False, forward="merged")
    model = peft.get_peft_model(transformers.T5ForConditionalGeneration(config), settings)
    layers = [layer for layer in model.modules() if isinstance(layer, FloraLayer)]
    made = builds(layers[0], monkeypatch)
    ids = torch.randint(40, (2, 5))
    model(input_ids=ids, labels=ids)
    assert len(made) == len(layers) == 4


class Fused(torch.autograd.Function):
    """What fused losses do: take the weight past torch's functions."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.t() @ x


@torch.jit.script
def scripted(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


USES = {
    "F.linear": F.linear,
    "views": lambda x, w: x @ torch.stack(list(w.t().t().view(5, 6))).T,
    "torch.cat": lambda x, w: F.linear(x, torch.cat([w[:2], w[2:]])),
    "autograd.Function": lambda x, w: Fused.apply(x, w),
    "reentrant checkpoint": lambda x, w: checkpoint(F.linear, x, w, use_reentrant=True),
    "checkpoint": lambda x, w: checkpoint(F.linear, x, w, use_reentrant=False),
    "functional_call": lambda x, w: torch.func.functional_call(
        nn.Linear(6, 5, bias=False, dtype=x.dtype), {"weight": w}, (x,)
    ),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
@pytest.mark.parametrize("within", [False, True])
def test_values_and_gradients_wherever_it_goes(model, layer, use, within):
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    parameters = [layer.core("default"), *layer.factors("default"), x]
    expected = x @ by_hand(layer).T
    gradients = torch.autograd.grad(expected.square().sum(), parameters)
    with flora.batched(model) if within else torch.enable_grad():
        output = use(x, layer.weight)
        torch.testing.assert_close(output, expected)
        output.square().sum().backward()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@torch.no_grad()
def test_scripted_code_sees_the_sum_or_fails(layer):
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(scripted(x, layer.weight), x @ by_hand(layer).T)
    torch.testing.assert_close(torch.vmap(torch.sin)(layer.weight), by_hand(layer).sin())


COPIES = {
    "detach": lambda w: w.detach(),
    "its data": lambda w: w.data,
    "clone": lambda w: w.detach().clone(),
    "numpy": lambda w: torch.from_numpy(w.detach().numpy()),
    "safetensors": lambda w: load(save({"w": w.detach()}))["w"],
    "tensor": lambda w: torch.tensor(w.detach()),
    "deepcopy": lambda w: copy.deepcopy(w.detach()),
    "pickle": lambda w: pickle.loads(pickle.dumps(w.detach().clone())),
    "parameter": lambda w: nn.Parameter(w.detach()),
    "another's data": lambda w: setattr(new := nn.Linear(6, 5), "weight", nn.Parameter(w.data.clone())) or new.weight,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_copies_hold_the_sum_and_keep_it(layer, copied):
    expected = by_hand(layer).detach().clone()
    copy = copied(layer.weight)
    with torch.no_grad():
        layer.core("default").mul_(3)
        layer.base_layer.weight.add_(1)
    assert torch.allclose(copy, expected)


def test_used_after_a_change_it_is_an_error(model, layer):
    early = layer.weight
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"^0\.weight: was read before its adapters or their parameters changed"):
        early + 0
    model.unmerge_adapter()
    kept = layer.weight
    torch.testing.assert_close(kept + 0, by_hand(layer))
    with torch.no_grad():
        layer.core("default").mul_(2)
    assert not torch.allclose(kept + 0, by_hand(layer))  # as a tensor computed then


WRITES = {
    "zero_": lambda w: w.zero_(),
    "its data": lambda w: w.data.zero_(),
    "detach": lambda w: w.detach().mul_(2),
    "data = ": lambda w: setattr(w, "data", torch.ones(5, 6)),
    "index": lambda w: w.__setitem__(0, 0.0),
    "row": lambda w: w[0].zero_(),
    "row of data": lambda w: w.data[0].zero_(),
    "view": lambda w: w.view(-1).zero_(),
    "transposed": lambda w: w.T.zero_(),
    "rows": lambda w: [row.zero_() for row in w.unbind()],
    "init": lambda w: nn.init.kaiming_uniform_(w),
    "out": lambda w: torch.add(torch.ones(5, 6), 1, out=w),
    "+=": lambda w: w.__iadd__(1),
    "foreach": lambda w: torch._foreach_add_([w], 1),
    "requires_grad_": lambda w: w.requires_grad_(True),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_writing_to_it_is_refused(layer, write):
    before = layer.base_layer.weight.clone()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"^0\.weight: reads as W \+ update.*would be lost"):
        write(layer.weight)
    assert torch.equal(layer.base_layer.weight, before)


@pytest.mark.parametrize("form", ["auto", "merged", "factored"])
def test_a_weight_pruned_after_wrapping_is_not_taken_for_an_adapted_one(form):
    torch.manual_seed(0)
    settings = flora.FloraConfig(r=3, init_weights=False, target_modules=["0"], forward=form)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 5)), settings)
    layer, x = model.base_model.model[0], torch.randn(3, 6)
    torch.nn.utils.prune.random_unstructured(layer.base_layer, "weight", amount=0.5)
    expected = F.linear(x, layer.base_layer.weight + layer.get_delta_weight("default"), layer.base_layer.bias)
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match=r"0\.weight: is computed anew by a hook .*prune\.remove"):
        model.merge_adapter()


@pytest.mark.parametrize("forward_hook", [True, False])
@pytest.mark.parametrize("within", [True, False])
def test_auto_does_with_changing_hooks_what_lora_does(forward_hook, within):
    torch.manual_seed(0)
    settings = flora.FloraConfig(r=3, init_weights=False, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 6)), settings)
    layer, x = model.base_model.model[0], torch.randn(3, 6)
    assert layer.form_for(["default"]) == "merged"
    if forward_hook:
        layer.base_layer.register_forward_hook(lambda module, args, output: output * 2)
    else:
        layer.base_layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    expected = layer.base_layer(x) + F.linear(x, layer.get_delta_weight("default"))
    with flora.batched(model) if within else torch.enable_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
