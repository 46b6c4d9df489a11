"""Weights built together for same-shaped layers: the same numbers as layer by layer, and off where they cannot be."""

import gc
import weakref
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flora
from flora.adapters.fast import torch_plan
from flora.adapters.fast.batched import plans
from tests.adapters.fast.nets import (
    TARGETS,
    Net,
    adapt,
    assert_same,
    built,
    enters,
    gradients,
    layer_by_layer,
    plans_of,
)

pytestmark = pytest.mark.usefixtures("double")


def count_builds(monkeypatch) -> list[int]:
    """Counts, per call, how many layers' weights a stack built."""
    built: list[int] = []
    add = torch_plan._add
    monkeypatch.setattr(
        torch_plan, "_add", lambda stack, *products: built.append(len(stack.layers)) or add(stack, *products)
    )
    return built


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_outputs_and_gradients_are_those_of_layer_by_layer(x, memory_format, monkeypatch):
    model = adapt(Net().to(memory_format=memory_format))
    alone = layer_by_layer(model)
    counts = count_builds(monkeypatch)
    expected = gradients(alone, x), alone(x)
    assert not counts
    actual = gradients(model, x)
    assert sorted(counts) == [1, 1, 2, 2, 2, 3]  # stem, up; convolutions, depthwise, pointwise; linear layers
    assert_same(actual, expected[0])
    torch.testing.assert_close(model(x), expected[1])


def test_built_weights_keep_the_memory_format_of_the_base():
    model = adapt(Net().to(memory_format=torch.channels_last))
    weights = []
    layer = model.base_model.model.conv[0]
    layer.base_layer._conv_forward = lambda x, weight, bias: (
        weights.append(weight) or F.conv2d(x, weight, bias, padding=1)
    )
    model(torch.randn(1, 3, 6, 6))
    assert weights[0].is_contiguous(memory_format=torch.channels_last)
    assert not weights[0].is_contiguous()


def test_gradients_of_gradients(x):
    model = adapt(Net())

    def penalty(model: peft.PeftModel) -> list[Tensor]:
        parameters = [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad(model(x).square().sum(), parameters, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), parameters))

    for ours, theirs in zip(penalty(model), penalty(layer_by_layer(model)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("form", ["merged", "factored"])
def test_gradcheck(form):
    model = adapt(Net(), target_modules=r"(conv|depthwise|fc)\.\d", forward=form)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    values = tuple(p.detach().clone().requires_grad_() for p in model.parameters() if p.requires_grad)
    x = torch.randn(2, 3, 4, 4)

    def output(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(output, values, atol=1e-4, fast_mode=True)


def test_gradient_accumulation(x):
    model = adapt(Net())
    alone = layer_by_layer(model)
    for part in x.split(2):
        for each in (model, alone):
            each(part).square().sum().backward()
    pairs = zip(model.named_parameters(), alone.named_parameters(), strict=True)
    assert_same(*({name: p.grad for name, p in side if p.requires_grad} for side in zip(*pairs, strict=True)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(x, reentrant, monkeypatch):
    model = adapt(Net())
    expected = gradients(layer_by_layer(model), x)
    model.base_model.model.checkpointing = reentrant
    counts = count_builds(monkeypatch)
    assert_same(gradients(model, x.requires_grad_()), expected)
    assert len(counts) == 6 * (
        1 + reentrant
    )  # without and with gradients; not again while the backward pass recomputes


def test_training_steps_see_new_parameters(x):
    model = adapt(Net())
    alone = layer_by_layer(model)
    for each in (model, alone):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model(x), alone(x))
    inner, expected = model.base_model.model, alone.base_model.model
    model(x)
    with torch.no_grad():
        for p in (*model.parameters(), *alone.parameters()):
            if p.requires_grad:
                p.mul_(1.1)
    torch.testing.assert_close(
        inner.fc[0](x[..., 0, 0, None].expand(-1, -1, 5)), expected.fc[0](x[..., 0, 0, None].expand(-1, -1, 5))
    )


@pytest.mark.parametrize("captured", [True, False])
def test_a_plan_lives_on_for_the_cuda_graphs_that_read_its_tables(x, captured, monkeypatch):
    model = adapt(Net())
    monkeypatch.setattr("flora.adapters.fast.batched.capturing", lambda tensor: captured)
    model(x)
    monkeypatch.undo()
    plan = weakref.ref(plans_of(model)[0])
    model.eval()(x)  # as between two replays of a training step
    gc.collect()
    assert plans_of(model)[0] is not plan()
    assert (plan() is not None) == captured


def test_several_disabled_merged_and_renewed_adapters(x):
    model = adapt(Net())
    model.add_adapter("second", flora.FloraConfig(target_modules=TARGETS, r=2, init_weights=False, forward="merged"))
    states: list[tuple[str, Any]] = [
        ("second alone", lambda m: m.set_adapter("second")),
        ("both", lambda m: m.base_model.set_adapter(["default", "second"])),
        ("scaled", lambda m: m.base_model.model.fc[0].scale_layer(3.0)),
        ("first again", lambda m: m.set_adapter("default")),
        ("merged", lambda m: m.merge_adapter()),
        ("unmerged", lambda m: m.unmerge_adapter()),
        ("deleted", lambda m: m.delete_adapter("second")),
    ]
    model(x)
    alone = layer_by_layer(model)
    for name, change in states:
        for each in (model, alone):
            change(each)
        torch.testing.assert_close(model(x), alone(x), msg=lambda text, name=name: f"{name}: {text}")
    with model.disable_adapter():
        torch.testing.assert_close(model(x), model.get_base_model()(x))
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), alone(x))


@pytest.mark.parametrize(
    "setting",
    [
        {"use_dora": True},
        {"flora_dropout": 0.5, "target_modules": r"fc\.\d"},
        {"forward": "factored", "target_modules": r"(conv|pointwise)\.\d"},
    ],
)
def test_layers_that_cannot_share_build_their_own(x, setting, monkeypatch):
    counts = count_builds(monkeypatch)
    model = adapt(Net(), **setting)
    model(x)
    assert not counts
    assert not plans(model.block.layers)


def test_sharded_offloaded_and_trained_weights_are_left_out():
    model = adapt(Net())
    fc = model.base_model.model.fc
    fc[0].base_layer.weight.requires_grad_(True)
    fc[1].base_layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # as ZeRO-3 leaves it between uses
    (plan,) = plans(model.block.layers)
    (stack,) = [stack for stack in plan.stacks if stack.described.shape == (5, 5)]
    assert stack.layers == (fc[2],)
    assert not plans(model.to("meta").block.layers)


@pytest.mark.parametrize("form", ["merged", "factored"])
def test_layers_whose_factors_differ_in_dtype_build_their_own(form):
    torch.set_default_dtype(torch.float32)
    model = adapt(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), target_modules=["0", "1"], forward=form)
    x = torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert len(built(model, x)) == 2
        factor = model.base_model.model[0].tucker_factors["default"].weight_0
        factor.data = factor.data.half()  # past the module, so that nothing else tells
        torch.testing.assert_close(model(x), layer_by_layer(model)(x), rtol=0.02, atol=0.002)
        assert not built(model, x)
    torch.testing.assert_close(model(x), layer_by_layer(model)(x))


@pytest.mark.parametrize("form", ["auto", "merged", "factored"])
def test_shapes_are_found_on_the_meta_device(form, x):
    model = adapt(Net(), forward=form)
    expected = model(x).shape
    assert model.to("meta")(x.to("meta")).shape == expected


@enters
def test_compiled_models_build_within_their_layers(x):
    model = adapt(Net())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_functional_transforms(x):
    model = adapt(Net())
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    expected = torch.autograd.grad(model(x).square().sum(), list(parameters.values()))
    for ours, theirs in zip(torch.func.grad(loss)(parameters).values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_explain_says_which_form_each_shape_runs_in():
    model = adapt(Net(), target_modules=r"(depthwise|fc)\.\d", scale_pattern={"fc.2": 2.0})
    assert model.base_model.explain() == [
        "merged [6, 1, 3, 5] ranks [3, 1, 2, 2]: 2 weights, 2 built together (depthwise.0.weight, ...)",
        "merged [5, 5] ranks [3, 3]: 2 weights, 2 built together (fc.0.weight, ...)",
        "merged [5, 5] ranks [3, 3]: 1 weight (fc.2.weight)",
    ]
    thin = adapt(Net(), target_modules=r"fc\.\d", forward="factored")
    assert thin.base_model.explain() == ["factored [5, 5] ranks [3, 3]: 3 weights, 3 built together (fc.0.weight, ...)"]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("form", ["merged", "factored"])
def test_a_pass_that_is_left_without_a_backward_one_does_not_hinder_those_after_a_step(form, x):
    model = layer_by_layer(adapt(Net(), forward=form, target_modules=r"(conv|pointwise|fc)\.\d"))
    layer, expected = model.base_model.model.fc[2], gradients(model, x)
    layer.core("default").grad = torch.ones_like(layer.core("default"))
    with flora.batched(model):
        model(x)
        torch.optim.SGD([layer.core("default")], lr=0.1).step()
        found = gradients(model, x)
    assert_same(found, gradients(model, x))
    assert not torch.allclose(
        found["base_model.model.fc.0.tucker_core.default.weight"],
        expected["base_model.model.fc.0.tucker_core.default.weight"],
    )
