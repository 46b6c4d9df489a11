"""Weights built together for same-shaped layers: the same numbers as layer by layer, and off where they cannot be."""

import copy
import gc
import pickle
import weakref
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import flora
from flora.adapters.fast import torch_plan as stackwise
from flora.adapters.fast.builder import Builder, plans


class Net(nn.Module):
    """Pairs of same-shaped layers: convolutions, strided, depthwise and pointwise ones, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))
        self.depthwise = nn.ModuleList(nn.Conv2d(6, 6, (3, 5), padding=(1, 2), groups=6) for _ in range(2))
        self.pointwise = nn.ModuleList(nn.Conv2d(6, 6, 1) for _ in range(2))
        self.up = nn.ConvTranspose2d(6, 5, 2, stride=2)
        self.fc = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        self.head = nn.Linear(5, 4)
        self.checkpointing: bool | None = None  # use_reentrant, or None for no checkpoints

    def block(self, x: Tensor, i: int) -> Tensor:
        return torch.tanh(self.pointwise[i](self.depthwise[i](self.conv[i](x))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in range(2):
            if self.checkpointing is None:
                x = self.block(x, i)
            else:
                x = checkpoint(self.block, x, i, use_reentrant=self.checkpointing)
        x = self.up(x).mean((2, 3))
        for fc in self.fc:
            x = torch.tanh(fc(x))
        return self.head(x)


TARGETS = r"(stem|up|(conv|depthwise|pointwise|fc)\.\d)"


def adapt(base: nn.Module, **settings: Any) -> peft.PeftModel:
    settings = {"target_modules": TARGETS, "r": 3, "init_weights": False, "forward": "merged", "scale": 0.7} | settings
    torch.manual_seed(2)
    return peft.get_peft_model(copy.deepcopy(base), flora.FloraConfig(**settings))


def builder(model: peft.PeftModel) -> Builder:
    return model.base_model.builder


def layer_by_layer(model: peft.PeftModel) -> peft.PeftModel:
    """The same model with every layer building its own weight."""
    twin = copy.deepcopy(model)
    builder(twin).detach(twin.base_model.model)
    return twin


def count_builds(monkeypatch) -> list[int]:
    """Counts, per call, how many layers' weights a stack built."""
    built: list[int] = []
    add = stackwise._add
    monkeypatch.setattr(
        stackwise, "_add", lambda stack, *products: built.append(len(stack.layers)) or add(stack, *products)
    )
    return built


def gradients(model: peft.PeftModel, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    F.cross_entropy(model(x), torch.arange(len(x)) % 4).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(actual[name], value, rtol=0, atol=rtol * value.abs().max().item())


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(5, 3, 6, 6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_outputs_and_gradients_are_those_of_layer_by_layer(x, memory_format, monkeypatch):
    model = adapt(Net().to(memory_format=memory_format))
    alone = layer_by_layer(model)
    built = count_builds(monkeypatch)
    expected = gradients(alone, x), alone(x)
    assert not built
    actual = gradients(model, x)
    assert sorted(built) == [1, 1, 2, 2, 2, 3]  # stem, up; convolutions, depthwise, pointwise; linear layers
    assert_same(actual, expected[0])
    torch.testing.assert_close(model(x), expected[1])


def test_built_weights_keep_the_memory_format_of_the_base():
    model = adapt(Net().to(memory_format=torch.channels_last))
    seen = []
    layer = model.base_model.model.conv[0]
    layer.base_layer._conv_forward = lambda x, weight, bias: seen.append(weight) or F.conv2d(x, weight, bias, padding=1)
    model(torch.randn(1, 3, 6, 6))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert not seen[0].is_contiguous()


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
        for one in (model, alone):
            one(part).square().sum().backward()
    pairs = zip(model.named_parameters(), alone.named_parameters(), strict=True)
    assert_same(*({name: p.grad for name, p in side if p.requires_grad} for side in zip(*pairs, strict=True)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(x, reentrant, monkeypatch):
    model = adapt(Net())
    expected = gradients(layer_by_layer(model), x)
    model.base_model.model.checkpointing = reentrant
    built = count_builds(monkeypatch)
    assert_same(gradients(model, x.requires_grad_()), expected)
    assert len(built) == 6  # once; not again while the backward pass recomputes


def test_training_steps_see_new_parameters(x):
    model = adapt(Net())
    alone = layer_by_layer(model)
    for one in (model, alone):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            one(x).square().sum().backward()
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


def test_evaluation_leaves_nothing_behind(x):
    model = adapt(Net()).eval()
    with torch.no_grad():
        first = model(x)
        torch.testing.assert_close(model(x), first)
    assert not builder(model)._prepared


@pytest.mark.parametrize("captured", [True, False])
def test_a_plan_lives_on_for_the_cuda_graphs_that_read_its_tables(x, captured, monkeypatch):
    model = adapt(Net())
    monkeypatch.setattr("flora.adapters.fast.builder.capturing", lambda tensor: captured)
    model(x)
    monkeypatch.undo()
    plan = weakref.ref(builder(model)._plans[0])
    model.eval()(x)  # as between two replays of a training step
    gc.collect()
    assert builder(model)._plans[0] is not plan()
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
        for one in (model, alone):
            change(one)
        torch.testing.assert_close(model(x), alone(x), msg=lambda text, name=name: f"{name}: {text}")
    with model.disable_adapter():
        torch.testing.assert_close(model(x), model.get_base_model()(x))
    merged = model.merge_and_unload()
    assert not merged._forward_pre_hooks
    assert not merged._forward_hooks
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
    built = count_builds(monkeypatch)
    model = adapt(Net(), **setting)
    model(x)
    assert not built
    assert not plans(builder(model).layers)


def test_sharded_offloaded_and_trained_weights_are_left_out():
    model = adapt(Net())
    fc = model.base_model.model.fc
    fc[0].base_layer.weight.requires_grad_(True)
    fc[1].base_layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # as ZeRO-3 leaves it between uses
    (plan,) = plans(builder(model).layers)
    (stack,) = [stack for stack in plan.stacks if stack.described.shape == (5, 5)]
    assert stack.layers == (fc[2],)
    assert not plans(builder(model.to("meta")).layers)


@pytest.mark.parametrize("form", ["merged", "factored"])
def test_layers_whose_factors_differ_in_dtype_build_their_own(form):
    torch.set_default_dtype(torch.float32)
    model = adapt(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), target_modules=["0", "1"], forward=form)
    x = torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        assert len(builder(model)._prepared) == 2
        factor = model.base_model.model[0].tucker_factors["default"].weight_0
        factor.data = factor.data.half()  # past the module, so that nothing else tells
        torch.testing.assert_close(model(x), layer_by_layer(model)(x), rtol=0, atol=0)
        assert not builder(model)._prepared
    if form == "merged":
        with pytest.raises(RuntimeError, match="same dtype"):  # torch's own, as layer by layer
            model(x)
    else:
        torch.testing.assert_close(model(x), layer_by_layer(model)(x), rtol=0, atol=0)


@pytest.mark.parametrize("form", ["auto", "merged", "factored"])
def test_shapes_are_found_on_the_meta_device(form, x):
    model = adapt(Net(), forward=form)
    expected = model(x).shape
    assert model.to("meta")(x.to("meta")).shape == expected


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


@pytest.mark.parametrize("form", ["merged", "factored"])
def test_autocast_rounds_the_sum_once(form):
    """Updates far below bfloat16's resolution of W still move the weights that lie near a rounding boundary."""
    torch.set_default_dtype(torch.float32)
    base = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model = adapt(base, target_modules=["0", "1"], scale=1e-3, forward=form)
    alone = layer_by_layer(model)
    x = torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model(x), alone(x)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs)
    ours.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    if form == "merged":
        layer = model.base_model.model[0]
        exact = layer.base_layer.weight + layer.get_delta_weight("default")
        torch.testing.assert_close(builder(model)._prepared[id(layer)]["weight"], exact.bfloat16(), rtol=2**-8, atol=0)
        assert not torch.equal(builder(model)._prepared[id(layer)]["weight"], layer.base_layer.weight.bfloat16())


class Sharing(nn.Module):
    """Three linear layers on one tensor, which may change in place before the last, or leave autocast for it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(4))
        self.changes = self.leaves = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).float()
        together = self.query(x) + self.key(x)
        if self.changes:
            x = x.mul_(3) if torch.is_autocast_enabled("cpu") else x * 3
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.is_autocast_enabled("cpu") and not self.leaves):
            return together + self.value(x)


@pytest.fixture
def sharing() -> Sharing:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    return Sharing()


SHARING = ["first", "query", "key", "value"]


@pytest.mark.parametrize("form", ["merged", "factored"])
@pytest.mark.parametrize("changes", [False, True])
def test_layers_on_one_input_keep_one_copy_of_it_under_autocast(form, changes, sharing):
    sharing.changes = changes
    model = adapt(sharing, target_modules=SHARING, forward=form)
    x, kept = torch.randn(5, 8), {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.bfloat16 and tensor.shape == (5, 8):
            kept[tensor.data_ptr()] = tensor
        return tensor

    exact = gradients(model, x)
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = F.cross_entropy(model(x), torch.arange(5) % 4)
    assert len(kept) == (3 if changes else 2)  # what the first layer takes, and what the three share
    model.zero_grad()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_same(found, exact, rtol=0.05)


class Checkpointed(nn.Module):
    """A module whose forward pass is computed again in the backward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("form", ["merged", "factored"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_under_autocast(form, reentrant, sharing):
    wrapped = Checkpointed(sharing)
    wrapped.reentrant = reentrant
    model = adapt(wrapped, target_modules=SHARING, forward=form)
    x = torch.randn(5, 8, requires_grad=True)
    exact = gradients(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(gradients(model, x), exact, rtol=0.05)


@pytest.mark.parametrize("form", ["merged", "factored"])
def test_a_layer_outside_of_the_models_autocast_computes_in_full_precision(form, sharing):
    sharing.leaves = True
    model = adapt(sharing, target_modules=SHARING, forward=form)
    value, seen = model.base_model.model.value, []
    value.register_forward_hook(lambda layer, inputs, output: seen.append((*inputs, output)))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(5, 8))
    ((x, output),) = seen
    exact = F.linear(x, value.base_layer.weight + value.get_delta_weight("default"), value.base_layer.bias)
    torch.testing.assert_close(output, exact)


@pytest.mark.parametrize("trained", ["none", "all"])
def test_frozen_biases_are_converted_together_and_trained_ones_train(trained):
    torch.set_default_dtype(torch.float32)
    base = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 5, 1), nn.Flatten(), nn.Linear(45, 7))
    model = adapt(base, target_modules=["0", "1", "3"], forward="merged", bias=trained)
    x = torch.randn(2, 3, 3, 3)
    for _ in range(2):  # the second time after a change past autograd
        for layer in builder(model).layers:
            layer.base_layer.bias.data.mul_(1.5)
        with torch.autocast("cpu", torch.bfloat16):
            ours, alone = model(x), layer_by_layer(model)(x)
        torch.testing.assert_close(ours, alone, rtol=0.02, atol=0.02)
    with_bias = [built for built in builder(model)._prepared.values() if "bias" in built]
    assert len({built["bias"].untyped_storage().data_ptr() for built in with_bias}) == (trained == "none")
    assert len(with_bias) == (3 if trained == "none" else 0)
    ours.float().sum().backward()
    for layer in builder(model).layers:
        grad = layer.base_layer.bias.grad
        assert grad is None if trained == "none" else grad.dtype == torch.float32 and grad.abs().sum() > 0


def test_explain_says_which_form_each_shape_runs_in():
    model = adapt(Net(), target_modules=r"(depthwise|fc)\.\d", scale_pattern={"fc.2": 2.0})
    assert model.base_model.explain() == [
        "merged [6, 1, 3, 5] ranks [3, 1, 2, 2]: 2 weights, 2 built together (depthwise.0.weight, ...)",
        "merged [5, 5] ranks [3, 3]: 2 weights, 2 built together (fc.0.weight, ...)",
        "merged [5, 5] ranks [3, 3]: 1 weight (fc.2.weight)",
    ]
    thin = adapt(Net(), target_modules=r"fc\.\d", forward="factored")
    assert thin.base_model.explain() == ["factored [5, 5] ranks [3, 3]: 3 weights, 3 built together (fc.0.weight, ...)"]


def test_weights_are_handed_out_after_an_error_in_a_hook_or_a_layer(x):
    model, handed = adapt(Net()), []
    hook = model.base_model.model.register_forward_pre_hook(lambda *args: 1 / 0, prepend=True)
    with pytest.raises(ZeroDivisionError):
        model(x)
    hook.remove()
    with pytest.raises(RuntimeError, match="channels"):
        model(x[:, :2])
    layer = model.base_model.model.fc[0]
    layer.register_forward_hook(lambda *args: handed.append(builder(model).prepared_for(layer)))
    model(x)
    assert isinstance(handed[0]["weight"], Tensor)


@pytest.mark.parametrize("form", ["merged", "factored"])
@pytest.mark.parametrize("backward", [True, False])
def test_a_deleted_model_is_freed(form, backward):
    model = adapt(Net(), target_modules=r"(conv|fc)\.\d", forward=form)
    kept = [
        weakref.ref(part) for part in (builder(model), model.base_model.model.fc[0], model.base_model.model.stem.weight)
    ]
    output = model(torch.randn(2, 3, 6, 6)).sum()
    if backward:
        output.backward()
    del model, output
    gc.collect()
    assert [one() for one in kept] == [None, None, None]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_and_a_pickled_model_build_their_own_weights(again):
    model, x = adapt(Net()), torch.randn(2, 3, 6, 6)
    twin = again(model)
    built = {}
    with torch.no_grad():
        for layer in builder(twin).layers:
            layer.core("default").mul_(2)
            layer.register_forward_hook(
                lambda one, args, output: built.update({one: builder(twin)._prepared.get(id(one))})
            )
    assert not torch.allclose(twin(x), model(x))
    assert len(built) == len(builder(model).layers) > 0
    assert all(isinstance(one["weight"], Tensor) for one in built.values())


def test_a_sum_is_not_rounded_to_an_adapter_of_lower_precision():
    base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).float()
    model = adapt(base, target_modules=["0", "1"], init_weights=True)  # the update is zero
    x = torch.randn(3, 6).float()
    for name, parameter in model.named_parameters():
        if "tucker" in name:
            parameter.data = parameter.data.bfloat16()
    torch.testing.assert_close(model(x), base(x))


@pytest.mark.parametrize("form", ["merged", "factored"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_a_base_layer_are_called(form, kind):
    model, seen = adapt(nn.Sequential(nn.Linear(4, 4)), target_modules=["0"], forward=form), []
    base = model.base_model.model[0].base_layer
    getattr(base, f"register_{kind}_hook")(lambda *args: seen.append(kind))
    model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert seen == [kind]
