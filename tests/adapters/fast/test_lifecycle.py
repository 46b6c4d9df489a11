"""No state outlives a forward pass: errors, other passes before the backward one, threads, copies, changes within."""

import contextlib
import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import flora
from flora.adapters import FloraLayer
from flora.replaced import passes
from tests.adapters.fast.nets import TARGETS, Net, adapt, assert_same, gradients

pytestmark = pytest.mark.usefixtures("double")
FORMS = pytest.mark.parametrize("form", ["merged", "factored"])


def alone(base: nn.Module, **settings) -> peft.PeftModel:
    """An adapted copy of the model, outside of ``flora.batched``, as it is by default."""
    model = adapt(base, **settings)
    del model.forward
    return model


RUNS = pytest.mark.parametrize("run", [alone, adapt])


def by_hand(model: peft.PeftModel) -> nn.Module:
    """A copy of the base model with W + delta in place of each adapted weight."""
    merged = copy.deepcopy(model.get_base_model())
    for name, layer in list(merged.named_modules()):
        if isinstance(layer, FloraLayer):
            parent, _, child = name.rpartition(".")
            base, factors = layer.base_layer, layer.factors("default")
            delta = layer.core("default").detach()
            for mode, factor in enumerate(factors):
                if factor is not None:
                    delta = torch.tensordot(delta, factor.detach(), dims=([0], [1]))
                else:
                    delta = delta.movedim(0, -1)
                assert delta.shape[-1] == layer.weights["default"]["weight"].shape[mode]
            base.weight.data += layer.scaling["default"] * delta
            setattr(merged.get_submodule(parent), child, base)
    return merged


class Interrupting(nn.Module):
    """Raises in the middle of its forward pass when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.error is not None:
            raise self.error
        return self.second(x)


@RUNS
@FORMS
@pytest.mark.parametrize("error", [RuntimeError("here"), KeyboardInterrupt(), SystemExit(), GeneratorExit()])
def test_after_an_error_in_the_middle_the_next_call_sees_what_has_changed(run, form, error):
    model, x = run(Interrupting(), target_modules=["first", "second"], forward=form), torch.randn(3, 6)
    model.base_model.model.error = error
    with pytest.raises(type(error)):
        model(x)
    model.base_model.model.error = None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tucker" in name:
                parameter.mul_(1.5)
    torch.testing.assert_close(model(x), by_hand(model)(x))
    with model.disable_adapter():
        base = model.base_model.model
        expected = base.second.base_layer(base.first.base_layer(x))
        torch.testing.assert_close(model(x), expected)
    assert passes.running() is None


def change(name: str, model: peft.PeftModel, x: Tensor) -> None:
    """A forward pass in another way than the one whose backward pass is still to come."""
    if name == "no_grad":
        with torch.no_grad():
            model(x)
    elif name == "disabled":
        with model.disable_adapter():
            model(x)
    elif name == "another adapter":
        model.set_adapter("second")
        model(x)
        model.set_adapter("default")
    elif name == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
    elif name == "merge":
        model.merge_adapter()
        model.unmerge_adapter()
    else:
        model(x)


@RUNS
@FORMS
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("other", ["no_grad", "disabled", "another adapter", "autocast", "merge", "again"])
def test_another_pass_before_the_backward_pass_of_a_checkpointed_one(run, form, reentrant, other):
    torch.set_default_dtype(torch.float32)  # autocast leaves float64 alone
    model = run(Net(), target_modules=r"(conv|pointwise|fc)\.\d", forward=form)
    second = flora.FloraConfig(target_modules=r"fc\.\d", r=2, init_weights=False, forward=form)
    model.add_adapter("second", second)
    torch.manual_seed(0)
    x = torch.randn(5, 3, 6, 6, requires_grad=True)
    expected = gradients(model, x)
    model.zero_grad()
    model.base_model.model.checkpointing = reentrant
    loss = nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 4)
    change(other, model, x)
    loss.backward()
    actual = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_same(actual, {name: expected[name] for name in actual}, rtol=1e-4)


@RUNS
def test_two_threads_on_one_model_one_of_them_without_gradients(run, x):
    model = run(Net())
    expected, outputs, errors = gradients(model, x), model(x).detach(), []

    def work(grad: bool) -> None:
        try:
            for _ in range(20):
                if grad:
                    loss = nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 4)
                    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
                    found = torch.autograd.grad(loss, list(wanted.values()))
                    assert_same(dict(zip(wanted, found, strict=True)), expected)
                else:
                    with torch.no_grad():
                        output = model(x)
                    assert not output.requires_grad
                    torch.testing.assert_close(output, outputs)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(grad,)) for grad in (True, False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@RUNS
def test_a_thread_that_starts_within_a_block_builds_its_own(run, x):
    model, seen = run(Net()), []
    with flora.batched(model):
        thread = threading.Thread(target=lambda: seen.extend([passes.running(), model(x)]))
        thread.start()
        thread.join()
        assert passes.running() is not None
    assert seen[0] is None
    torch.testing.assert_close(seen[1], by_hand(model)(x))


class Copying(nn.Module):
    """Copies the whole model in the middle of its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.copies: list[nn.Module] = []
        self.how: Callable[[nn.Module], nn.Module] | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.how is not None:
            how, self.how = self.how, None
            self.copies.append(how(self))
        return self.second(x)


@FORMS
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_model_that_is_copied_in_the_middle_of_a_pass(how, within, form):
    model, x = alone(Copying(), target_modules=["first", "second"], forward=form), torch.randn(3, 6)
    expected = by_hand(model)(x)
    model.base_model.model.how = how
    with flora.batched(model) if within else contextlib.nullcontext():
        torch.testing.assert_close(model(x), expected)
    (twin,) = model.base_model.model.copies
    torch.testing.assert_close(twin(x), expected)
    with torch.no_grad():
        twin.first.core("default").mul_(2)
    assert not torch.allclose(twin(x), expected)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_a_copied_block_serves_the_model_that_is_copied_with_it(again, x):
    model = alone(Net())
    twin, block = again((model, flora.batched(model)))
    with torch.no_grad():
        for layer in block.layers:
            layer.core("default").mul_(2)
    with block:
        output = twin(x)
        assert all(passes.running().prepared_for(layer) for layer in block.layers)
    torch.testing.assert_close(output, by_hand(twin)(x))
    assert not torch.allclose(output, model(x))


@FORMS
@pytest.mark.parametrize("backward", [True, False])
def test_a_deleted_model_is_freed(form, backward):
    model = adapt(Net(), target_modules=r"(conv|fc)\.\d", forward=form)
    kept = [weakref.ref(part) for part in (model.block, model.base_model.model.fc[0], model.get_base_model().stem)]
    output = model(torch.randn(2, 3, 6, 6)).sum()
    if backward:
        output.backward()
    del model, output
    gc.collect()
    assert [part() for part in kept] == [None, None, None]


@RUNS
@FORMS
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_of_a_base_layer_are_called_from_when_they_are_registered(run, form, kind, everywhere):
    model, called = run(nn.Sequential(nn.Linear(4, 4)), target_modules=["0"], forward=form), []
    base, x = model.base_model.model[0].base_layer, torch.randn(2, 4, requires_grad=True)
    model(x).sum().backward()

    def hook(module: nn.Module, *values: object) -> None:
        if module is base:
            called.append(kind)

    owner = nn.modules.module if everywhere else base
    handle = getattr(owner, f"register_{'module_' * everywhere}{kind}_hook")(hook)
    model(x).sum().backward()
    handle.remove()
    assert called == [kind]
    model(x)
    assert called == [kind]


def states(model: peft.PeftModel) -> Iterator[str]:
    """Changes of a model, each with the name of what is changed."""
    inner = model.base_model.model
    model.set_adapter("second")
    yield "another adapter"
    model.set_adapter("default")
    yield "the first again"
    with model.disable_adapter():
        yield "disabled"
    inner.fc[0].scale_layer(3.0)
    yield "scaled"
    model.merge_adapter()
    yield "merged"
    model.unmerge_adapter()
    with torch.no_grad():
        inner.fc[1].core("default").mul_(2)
    yield "a parameter"
    with torch.no_grad():
        inner.conv[0].base_layer.weight.mul_(1.5)
    yield "a base weight"
    inner.fc[2].base_layer.weight = nn.Parameter(torch.randn(5, 5), requires_grad=False)
    yield "another base weight"
    inner.fc[2].base_layer = nn.Linear(5, 5).requires_grad_(False)
    yield "another base layer"
    model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()})
    yield "loaded"
    model.delete_adapter("second")
    yield "deleted"


@FORMS
@pytest.mark.parametrize("grad", [True, False])
def test_changes_within_one_block_take_effect(form, grad, x):
    model = alone(Net(), forward=form, target_modules=r"(conv|pointwise|fc)\.\d")
    model.add_adapter("second", flora.FloraConfig(target_modules=TARGETS, r=2, init_weights=False, forward=form))
    with torch.set_grad_enabled(grad), flora.batched(model):
        model(x)
        for name in states(model):
            token = passes.RUNNING.set(None)
            expected = model(x)
            passes.RUNNING.reset(token)
            torch.testing.assert_close(model(x), expected, msg=lambda text, name=name: f"{name}: {text}")


@FORMS
def test_a_block_around_training_steps_trains_as_without(form, x):
    model = alone(Net(), forward=form, target_modules=r"(conv|pointwise|fc)\.\d")
    twin = copy.deepcopy(model)
    for each, block in ((model, flora.batched(model)), (twin, contextlib.nullcontext())):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=0.1)
        with block:
            for part in x.split(2):
                optimizer.zero_grad()
                each(part).square().sum().backward()
                optimizer.step()
                with torch.no_grad():
                    each(part)
    torch.testing.assert_close(model(x), twin(x))


def test_blocks_of_two_models_within_each_other(x):
    one, two = alone(Net()), alone(Net(), scale=2.0)
    outer, inner = flora.batched(one), flora.batched(two)
    with outer, inner:
        outputs = one(x), two(x)
        shared = passes.running()
        assert all(shared.prepared_for(layer) for layer in (*outer.layers, *inner.layers))
    for output, model in zip(outputs, (one, two), strict=True):
        torch.testing.assert_close(output, by_hand(model)(x))


class Dropping(nn.Module):
    """Skips a layer, as LayerDrop does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.skips = -1

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            if i != self.skips:
                x = torch.tanh(layer(x))
        return x


@RUNS
@FORMS
@pytest.mark.parametrize("create_graph", [False, True])
def test_layers_that_a_pass_skips_get_no_gradient_and_do_not_move(run, form, create_graph):
    model = run(Dropping(), target_modules=r"layers\.\d", forward=form)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    x, inner = torch.randn(4, 6), model.base_model.model
    model(x).square().sum().backward()
    optimizer.step()
    for inner.skips in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward(create_graph=create_graph)
        for i, layer in enumerate(inner.layers):
            parameters = [p for p in layer.parameters() if p.requires_grad]
            assert all((p.grad is None) == (i == inner.skips) for p in parameters)
            assert i == inner.skips or all(p.grad.abs().sum() > 0 for p in parameters)
        skipped = [p.detach().clone() for p in inner.layers[inner.skips].parameters()]
        optimizer.step()
        for before, after in zip(skipped, inner.layers[inner.skips].parameters(), strict=True):
            assert torch.equal(before, after)


@RUNS
@FORMS
@pytest.mark.parametrize("operation", ["relu_", "iadd", "mul_", "masked_fill_"])
@pytest.mark.parametrize("shape", [(3, 6), (2, 3, 6)])
def test_outputs_can_be_changed_in_place(run, form, operation, shape):
    model = run(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), target_modules=["0", "1"], forward=form)
    x = torch.randn(*shape)

    def output(model: peft.PeftModel) -> Tensor:
        y = model(x)
        if operation == "iadd":
            y += 1
            return y
        if operation == "masked_fill_":
            return y.masked_fill_(y < 0, 0.0)
        return y.relu_() if operation == "relu_" else y.mul_(3)

    dense = by_hand(model)
    assert_same({"output": output(model).detach()}, {"output": output(dense).detach()})
    output(model).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@FORMS
def test_checkpoints_of_other_libraries_see_what_each_layer_computes(form):
    """Hooks on saved tensors get what is saved for each layer, so that they may move or recompute it."""
    model = alone(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), target_modules=["0", "1"], forward=form)
    x, saved = torch.randn(3, 6), []
    with flora.batched(model), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        checkpoint(model, x, use_reentrant=False).sum().backward()
    twin, count = copy.deepcopy(model), len(saved)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        checkpoint(twin, x, use_reentrant=False).sum().backward()
    assert len(saved) == 2 * count
