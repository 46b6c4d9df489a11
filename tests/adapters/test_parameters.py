"""Bare parameters read as W + update, whoever reads them, and nothing is left on the model, whatever happens."""

import copy
import importlib
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import flora

from . import by_hand


class Experts(nn.Module):
    """Reads its parameter once per expert, as the mixtures of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 6, 5)), nn.Parameter(torch.randn(3, 5, 6))
        self.meanwhile: Callable[[], Any] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        y = sum(torch.tanh(x @ self.up[i].T) @ self.down[i].T for i in range(3))
        self.meanwhile()
        return y + torch.tanh(x @ self.up[0].T) @ self.down[2].T

    def encode(self, x: Tensor) -> Tensor:
        return x @ self.up.sum(0).T


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(4, 5))
        self.first, self.second = Experts(), Experts()
        self.mixes = nn.ParameterList([nn.Parameter(torch.randn(5, 5)) for _ in range(2)])
        self.tables = nn.ParameterDict({"out": nn.Parameter(torch.randn(5, 5))})

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x + self.position)
        for mix in self.mixes:
            x = torch.tanh(x @ mix)
        return self.second(x @ self.tables["out"])


TARGETS = ["position", "up", "down"]
LISTED = [*TARGETS, "mixes.0", "mixes.1", "tables.out"]
SETTINGS: dict[str, Any] = {"target_parameters": TARGETS, "r": 2, "init_weights": False}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def net() -> Net:
    return Net().requires_grad_(False)


@pytest.fixture
def model(net) -> peft.PeftModel:
    return adapt(net)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 5)


def adapt(net: nn.Module, **settings: Any) -> peft.PeftModel:
    return peft.get_peft_model(copy.deepcopy(net), flora.FloraConfig(**{**SETTINGS, **settings}))


def inner(model: peft.PeftModel) -> Any:
    return model.base_model.model


def assert_base_is_base(model: peft.PeftModel, net: Net, x: Tensor) -> None:
    own = dict(inner(model).named_parameters())
    for name, parameter in net.named_parameters():
        assert isinstance(own[name], nn.Parameter), name
        assert torch.equal(own[name], parameter), name
    with model.disable_adapter():
        torch.testing.assert_close(model(x), net(x), rtol=0, atol=0)


# ---------------------------------------------------------------------- who reads


def test_every_read_sees_the_update(net, x):
    model = adapt(net, target_parameters=LISTED)
    expected = by_hand.run(net, model, x)
    assert not torch.allclose(expected, net(x))
    torch.testing.assert_close(model(x), expected)
    ours = by_hand.gradients(model, model(x).square().sum())
    by_hand.assert_same_gradients(ours, by_hand.gradients(model, expected.square().sum()))
    assert len(ours) == len([p for p in model.parameters() if p.requires_grad])


def test_methods_other_than_forward_see_the_update(model, net, x):
    update = by_hand.updates(model)["first.up"]
    torch.testing.assert_close(inner(model).first.encode(x), x @ (net.first.up + update).sum(0).T)


def test_lists_of_parameters_see_the_update(net):
    model = adapt(net, target_parameters=LISTED)
    expected = by_hand.updates(model)
    for i, mix in enumerate(inner(model).mixes):
        torch.testing.assert_close(mix, net.mixes[i] + expected[f"mixes.{i}"])
    ((_, table),) = inner(model).tables.items()
    torch.testing.assert_close(table, net.tables["out"] + expected["tables.out"])


def test_a_weight_that_the_parent_reads_sees_the_update():
    encoder = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0).requires_grad_(False)
    names = ["self_attn.out_proj.weight", "linear1.weight"]
    model, x = adapt(encoder, target_parameters=names).eval(), torch.randn(2, 3, 8)
    expected = by_hand.run(encoder, model, x)
    torch.testing.assert_close(model(x), expected)
    with torch.no_grad():  # torch's fused kernel reads the weights of all children
        torch.testing.assert_close(model(x), expected)


def test_a_call_computes_each_parameter_once(model, x):
    """And outside of a call nothing is kept."""
    owner, seen = inner(model).first, []
    owner.meanwhile = lambda: seen.append((owner.up is owner.up, owner.down is owner.down))
    owner(x)
    assert seen == [(True, True)]
    assert owner.up is not owner.up


def test_what_handles_parameters_gets_the_base(model, net):
    for name, parameter in net.named_parameters():
        assert torch.equal(inner(model).get_parameter(name), parameter)
        assert torch.equal(inner(model).state_dict()[name], parameter)
    assert {id(p) for p in inner(model).first.parameters(recurse=False)} == {
        id(inner(model).get_parameter(f"first.{name}")) for name in ("up", "down")
    }


def test_owners_keep_their_kind(net, x):
    model = adapt(net, target_parameters=LISTED)
    for owner, kind in [(inner(model), Net), (inner(model).first, Experts), (inner(model).mixes, nn.ParameterList)]:
        assert isinstance(owner, kind)
        assert (type(owner).__name__, type(owner).__module__) == (kind.__name__, kind.__module__)
    assert type(inner(model).first) is type(inner(model).second)
    expected = by_hand.run(net, model, x)
    merged = model.merge_and_unload()
    assert [type(module) for module in merged.modules()] == [type(module) for module in net.modules()]
    assert merged.state_dict().keys() == net.state_dict().keys()
    torch.testing.assert_close(merged(x), expected)


def test_unloading_gives_the_base_back(model, net, x):
    base = model.unload()
    assert [type(module) for module in base.modules()] == [type(module) for module in net.modules()]
    assert torch.equal(base(x), net(x))


# ---------------------------------------------------------------------- in the middle of a forward pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, ArithmeticError])
def test_an_interrupt_leaves_nothing_behind(error, model, net, x):
    def stop() -> None:
        raise error

    inner(model).second.meanwhile = stop
    with pytest.raises(error):
        model(x)
    inner(model).second.meanwhile = lambda: None
    assert_base_is_base(model, net, x)
    for parameter in model.parameters():
        parameter.data.mul_(1.5 if parameter.requires_grad else 1)
    torch.testing.assert_close(model(x), by_hand.run(net, model, x))


def test_threads_do_not_see_each_other(model, net, x):
    """One runs without gradients and waits within the forward pass while the other trains."""
    entered, trained = threading.Event(), threading.Event()
    outputs = []

    def infer() -> None:
        with torch.no_grad():
            outputs.append(model(x))

    def wait() -> None:
        if not torch.is_grad_enabled():
            entered.set()
            assert trained.wait(30)

    inner(model).first.meanwhile = wait
    thread = threading.Thread(target=infer)
    thread.start()
    assert entered.wait(30)
    try:
        ours = by_hand.gradients(model, model(x).square().sum())
    finally:
        trained.set()
        thread.join()
    expected = by_hand.run(net, model, x)
    by_hand.assert_same_gradients(ours, by_hand.gradients(model, expected.square().sum()))
    torch.testing.assert_close(outputs, [expected.detach()])


def saved_whole(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "oldest pickle": lambda model: pickle.loads(pickle.dumps(model, protocol=0)),
    "torch.save": saved_whole,
}


def nothing() -> None:
    """Picklable."""


@pytest.mark.parametrize("during", [False, True])
@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_right_and_apart(kind, during, model, net, x):
    copies = []

    def take() -> None:
        inner(model).first.meanwhile = inner(model).second.meanwhile = nothing
        copies.append(COPIES[kind](model))

    inner(model).first.meanwhile = inner(model).second.meanwhile = nothing
    if during:
        inner(model).second.meanwhile = take
        model(x)
    else:
        take()
    (copied,) = copies
    expected = by_hand.run(net, model, x)
    torch.testing.assert_close(copied(x), expected)
    assert_base_is_base(copied, net, x)
    for parameter in copied.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(model(x), expected)


def test_what_is_read_of_the_model_meanwhile_is_the_base(model, net, x):
    seen = []
    inner(model).second.meanwhile = lambda: seen.append(
        {**inner(model).state_dict(), **dict(inner(model).named_parameters())}
    )
    model(x)
    for name, value in net.state_dict().items():
        assert torch.equal(seen[0][name], value), name


def test_replicas_use_their_own_tensors(model, net, x, monkeypatch):
    """torch.nn.DataParallel's own replication, with copies that this machine can make."""
    replicating = importlib.import_module("torch.nn.parallel.replicate")

    def doubled(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[2 * tensor for tensor in tensors] for _ in devices]

    monkeypatch.setattr(replicating, "_broadcast_coalesced_reshape", doubled)
    monkeypatch.setattr(replicating, "_get_device_index", lambda device, _: device)
    replicas = replicating.replicate(model, [0, 1])
    expected = copy.deepcopy(model)
    for parameter in expected.parameters():
        parameter.data.mul_(2)
    for copied in replicas:
        torch.testing.assert_close(copied(x), expected(x))
    loss = sum(copied(x).square().sum() for copied in replicas)
    theirs = by_hand.gradients(expected, expected(x).square().sum())
    by_hand.assert_same_gradients(by_hand.gradients(model, loss), {name: 4 * g for name, g in theirs.items()})
    assert_base_is_base(model, net, x)


# ---------------------------------------------------------------------- gradient checkpointing


def others(model: peft.PeftModel, x: Tensor) -> None:
    """Whatever may run between a forward pass and its backward pass."""
    with torch.no_grad():
        model(x)
    with model.disable_adapter():
        model(x)
    model.set_adapter("other")
    model(x).sum().backward()
    model.set_adapter("default")
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    model.merge_adapter()
    model(x)
    model.unmerge_adapter()


class Checkpointed(Net):
    """Checkpoints an owner, and parts of its own forward that read its parameter, which it reads outside too."""

    reentrant: bool | None = None

    def run(self, part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return part(x) if self.reentrant is None else checkpoint(part, x, use_reentrant=self.reentrant)

    def part(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.position) * self.position + self.position.sin()

    def forward(self, x: Tensor) -> Tensor:
        x = self.run(self.part, self.run(self.part, x * self.position + self.position))
        return self.run(self.first, x) + self.position


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_with_other_passes_before_backward(reentrant, x):
    net = Checkpointed().float().requires_grad_(False)
    model, x = adapt(net), x.float().requires_grad_()
    model.add_adapter("other", flora.FloraConfig(**SETTINGS))
    expected = by_hand.gradients(model, by_hand.run(net, model, x).square().sum())
    inner(model).reentrant = reentrant
    loss = model(x).square().sum()
    others(model, x)
    model.zero_grad()
    loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and "default" in name}
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-5 * largest, msg=name)
