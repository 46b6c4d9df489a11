"""Modules of all kinds that own adapted bare parameters, alone, in one another, and under torch's own transforms."""

import abc
import copy
from collections.abc import Iterator
from typing import Any, ClassVar, Generic, TypeVar

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import stateless

import flora

from . import by_hand

Kind = TypeVar("Kind")


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w)


class Registered(nn.Module, abc.ABC, Generic[Kind]):
    """Notes its subclasses, among which that of an adapted owner must not be."""

    kinds: ClassVar[list[type]] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Registered.kinds.append(cls)

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    @abc.abstractmethod
    def name(self) -> str: ...

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w)


class Concrete(Registered[int]):
    def name(self) -> str:
        return "concrete"


class Nested(Plain):
    """An owner within an owner, which reads its own parameter before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(super().forward(x)) @ self.w + self.inner.w


class Recursive(Plain):
    def forward(self, x: Tensor, depth: int = 3) -> Tensor:
        return torch.tanh(self(x, depth - 1) @ self.w) + self.w if depth else x


class Generating(Plain):
    """A forward pass that is read from after the call has returned."""

    def parts(self, x: Tensor) -> Iterator[Tensor]:
        for _ in range(3):
            x = torch.tanh(x @ self.w)
            yield x

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(list(self.parts(x))).sum(0)


class Mixed(Plain):
    """Reads under both gradient modes: what is computed without a graph must not serve where one is needed."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.w.norm()
        with torch.inference_mode():
            self.w.sum()
        return torch.tanh(x @ self.w) * scale


class InSequence(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.Tanh())
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x @ self.w)


class Dynamic(Plain):
    def __getattr__(self, name: str) -> Any:
        return 2.0 if name == "factor" else super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


OWNERS = [Plain, Concrete, Nested, Recursive, Generating, Mixed, InSequence, Dynamic]


def adapt(net: nn.Module, **settings: Any) -> peft.PeftModel:
    config = flora.FloraConfig(target_parameters=["w"], r=2, init_weights=False, **settings)
    return peft.get_peft_model(copy.deepcopy(net), config)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 4)


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("kind", OWNERS)
def test_owners_of_all_kinds(kind, root, x):
    net = (kind() if root else nn.Sequential(nn.Linear(4, 4), kind())).requires_grad_(False)
    model, registered = adapt(net), len(Registered.kinds)
    ours, expected = model(x), by_hand.run(net, model, x)
    torch.testing.assert_close(ours, expected)
    gradients = by_hand.gradients(model, ours.square().sum())
    theirs = by_hand.gradients(model, expected.square().sum())
    assert gradients.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(x), expected)
    merged = copied.merge_and_unload()
    assert [type(module) for module in merged.modules()] == [type(module) for module in net.modules()]
    torch.testing.assert_close(merged(x), expected)
    assert len(Registered.kinds) == registered


def test_owners_that_do_not_run_get_no_gradient(x):
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Plain(), Plain()

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)

    model = adapt(Dropped())
    model(x).sum().backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, gradient in trained.items() if gradient is None} == {n for n in trained if ".second." in n}


def test_several_adapters_of_one_owner(x):
    net = Nested().requires_grad_(False)
    model = adapt(net)
    model.add_adapter("other", flora.FloraConfig(target_parameters=["inner.w"], r=3, init_weights=False))
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        torch.testing.assert_close(model(x), by_hand.run(net, model, x, adapters=[name]))
    model.base_model.set_adapter(["default", "other"])
    expected = by_hand.run(net, model, x, adapters=["default", "other"])
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter(["default", "other"])
    torch.testing.assert_close(model(x), expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), net(x))
    model.delete_adapter("other")
    torch.testing.assert_close(model(x), by_hand.run(net, model, x))
    torch.testing.assert_close(model.unload().w, net.w)  # merged and unmerged


def test_a_second_adapter_of_other_parameters_of_an_owner():
    net = nn.Bilinear(3, 4, 5)
    net.v = nn.Parameter(torch.randn(4, 4))
    model = peft.get_peft_model(
        nn.Sequential(copy.deepcopy(net)), flora.FloraConfig(target_parameters=["weight"], init_weights=False)
    )
    model.add_adapter("other", flora.FloraConfig(target_parameters=["v"], init_weights=False))
    (owner,) = model.base_model.model
    assert torch.equal(owner.v, net.v)
    model.set_adapter("other")
    assert torch.equal(owner.weight, net.weight)
    torch.testing.assert_close(owner.v, net.v + by_hand.updates(model, "other")["0.v"])
    assert type(model.unload()[0]) is nn.Bilinear


def test_an_error_while_the_update_is_computed_is_not_taken_for_a_missing_attribute(x, monkeypatch):
    """Python asks nn.Module.__getattr__ after an AttributeError, which would give W."""
    model = adapt(Plain())
    layer = model.base_model.model.adapted_parameters
    monkeypatch.setattr(layer, "core", lambda *_: object().missing)
    with pytest.raises(RuntimeError, match="w: 'object' object has no attribute 'missing'"):
        model(x)


# ---------------------------------------------------------------------- torch's transforms


def traced(model: nn.Module, x: Tensor) -> Tensor:
    return torch.jit.trace(model, (torch.zeros_like(x),), check_trace=False)(x)


def functional(model: nn.Module, x: Tensor) -> Tensor:
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data.zero_()
    return torch.func.functional_call(model, parameters, (x,))


def functional_of_old(model: nn.Module, x: Tensor) -> Tensor:
    return stateless.functional_call(model, dict(model.named_parameters()), (x,))


def vectorized(model: nn.Module, x: Tensor) -> Tensor:
    return torch.vmap(lambda row: model(row[None])[0])(x)


def ensemble(model: nn.Module, x: Tensor) -> Tensor:
    parameters, buffers = torch.func.stack_module_state([model, model])
    run = torch.vmap(lambda p, b: torch.func.functional_call(model, (p, b), (x,)))
    return run(parameters, buffers)[1]


TRANSFORMS = {
    "jit.trace": traced,
    "functional_call": functional,
    "stateless": functional_of_old,
    "vmap": vectorized,
    "ensemble": ensemble,
    "make_fx": lambda model, x: make_fx(model)(torch.zeros_like(x))(x),
    "export": lambda model, x: torch.export.export(model, (x,)).module()(x),
    "export, not strict": lambda model, x: torch.export.export(model, (x,), strict=False).module()(x),
    "compile": lambda model, x: torch.compile(model, fullgraph=True, backend="aot_eager")(x),
    "inference mode": lambda model, x: torch.inference_mode()(lambda: model(x))(),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,))[0],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform, x):
    net = nn.Sequential(nn.Linear(4, 4), Plain()).requires_grad_(False)
    model = adapt(net)
    expected = by_hand.run(net, model, x).detach()
    torch._dynamo.reset()
    torch.testing.assert_close(TRANSFORMS[transform](model, x), expected)


def test_jacobians_by_the_adapters_parameters(x):
    net = Plain().requires_grad_(False)
    model = adapt(net)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    jacobian = torch.func.jacrev(lambda own: torch.func.functional_call(model, own, (x,)).sum(0))(trained)
    for column in range(4):
        theirs = by_hand.gradients(model, by_hand.run(net, model, x).sum(0)[column])
        assert theirs.keys() == jacobian.keys()
        for name, gradient in theirs.items():
            torch.testing.assert_close(jacobian[name][column], gradient, rtol=1e-4, atol=1e-5)


def test_what_handles_parameters_reads_w_also_while_another_thread_compiles(monkeypatch):
    """torch sets ``is_compiling`` for all threads; accelerate would save or move W + delta in the place of W."""
    model = peft.get_peft_model(Plain(), flora.FloraConfig(r=2, target_parameters=["w"], init_weights=False))
    owner = next(module for module in model.modules() if isinstance(module, Plain))
    asked = {"__name__": "accelerate.hooks", "owner": owner}
    before = eval("owner.w", asked)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert eval("owner.w", asked) is before is owner._parameters["w"]
    assert not torch.allclose(owner.w, before)
