"""Weights built together under autocast: what is rounded, when, and how often an input is converted."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import flora
from tests.adapters.fast.nets import adapt, assert_same, built, gradients, layer_by_layer

pytestmark = pytest.mark.usefixtures("double")


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
        with torch.autocast("cpu", torch.bfloat16):
            weight = built(model, x)[layer]["weight"]
        torch.testing.assert_close(weight, exact.bfloat16(), rtol=2**-8, atol=0)
        assert not torch.equal(weight, layer.base_layer.weight.bfloat16())


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


def saved(output: Tensor) -> list[Tensor]:
    """What autograd keeps for the backward pass of an output."""
    found, left, seen = [], [output.grad_fn], set()
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [next_node for next_node, _ in node.next_functions]
            own = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
            found += [value for value in (*own, *getattr(node, "saved_tensors", ())) if isinstance(value, Tensor)]
    return found


SHARING = ["first", "query", "key", "value"]


@pytest.mark.parametrize("form", ["merged", "factored"])
@pytest.mark.parametrize("changes", [False, True])
def test_layers_on_one_input_keep_one_copy_of_it_under_autocast(form, changes, sharing):
    sharing.changes = changes
    model = adapt(sharing, target_modules=SHARING, forward=form)
    x = torch.randn(5, 8)
    exact = gradients(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x), torch.arange(5) % 4)
    inputs = [tensor for tensor in saved(loss) if tensor.dtype == torch.bfloat16 and tensor.shape == (5, 8)]
    kept = {tensor.data_ptr() for tensor in inputs}
    assert len(kept) == (3 if changes else 2)  # what the first layer takes, and what the three share
    model.zero_grad()
    loss.backward()
    rounded = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_same(rounded, exact, rtol=0.05)


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
    value, calls = model.base_model.model.value, []
    value.register_forward_hook(lambda layer, inputs, output: calls.append((*inputs, output)))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(5, 8))
    ((x, output),) = calls
    exact = F.linear(x, value.base_layer.weight + value.get_delta_weight("default"), value.base_layer.bias)
    torch.testing.assert_close(output, exact)


@pytest.mark.parametrize("trained", ["none", "all"])
def test_frozen_biases_are_converted_together_and_trained_ones_train(trained):
    torch.set_default_dtype(torch.float32)
    base = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 5, 1), nn.Flatten(), nn.Linear(45, 7))
    model = adapt(base, target_modules=["0", "1", "3"], forward="merged", bias=trained)
    x = torch.randn(2, 3, 3, 3)
    for _ in range(2):  # the second time after a change past autograd
        for layer in model.block.layers:
            layer.base_layer.bias.data.mul_(1.5)
        with torch.autocast("cpu", torch.bfloat16):
            ours, alone = model(x), layer_by_layer(model)(x)
        torch.testing.assert_close(ours, alone, rtol=0.02, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        with_bias = [prepared for prepared in built(model, x).values() if "bias" in prepared]
    assert len({prepared["bias"].untyped_storage().data_ptr() for prepared in with_bias}) == (trained == "none")
    assert len(with_bias) == (3 if trained == "none" else 0)
    ours.float().sum().backward()
    for layer in model.block.layers:
        grad = layer.base_layer.bias.grad
        assert grad is None if trained == "none" else grad.dtype == torch.float32 and grad.abs().sum() > 0


def test_a_sum_is_not_rounded_to_an_adapter_of_lower_precision():
    base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).float()
    model = adapt(base, target_modules=["0", "1"], init_weights=True)  # the update is zero
    x = torch.randn(3, 6).float()
    for name, parameter in model.named_parameters():
        if "tucker" in name:
            parameter.data = parameter.data.bfloat16()
    torch.testing.assert_close(model(x), base(x))


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", [nn.Linear, lambda *sizes: nn.Conv2d(*sizes, 1)], ids=["linear", "conv"])
def test_a_forward_that_is_put_into_a_layer_and_leaves_autocast_gets_the_weight_in_its_own_dtype(kind, late, keep):
    torch.set_default_dtype(torch.float32)
    model = layer_by_layer(adapt(nn.Sequential(kind(6, 6)), target_modules=["0"]))
    base, x = model.base_model.model[0].base_layer, torch.randn(2, 6) if kind is nn.Linear else torch.randn(2, 6, 3, 3)
    forward = base.forward

    def exact(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return forward(x)

    block = None if late else flora.batched(model, keep)
    base.forward = exact
    block = block or flora.batched(model, keep)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            expected = model(x)
            with block:
                assert torch.equal(model(x), expected)
