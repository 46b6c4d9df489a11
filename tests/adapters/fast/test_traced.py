"""Weights built together within a compiled region: built there, the same numbers, and off where they cannot be."""

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

import flora
from tests.adapters.fast.nets import Net, adapt, assert_same, enters, gradients, layer_by_layer

pytestmark = pytest.mark.usefixtures("double")


class Watch:
    """A back end of torch.compile that notes how many tensors were built together in each graph."""

    def __init__(self) -> None:
        self.built: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        builds = [node for node in graph.graph.nodes if getattr(node.target, "__name__", "") == "build"]
        self.built.append(sum(len(node.meta["example_value"]) for node in builds))
        return aot_eager(graph, inputs)

    def compile(self, run: Any, **options: Any) -> Any:
        torch._dynamo.reset()
        return torch.compile(run, backend=self, **{"fullgraph": True} | options)


@pytest.fixture
def watch() -> Watch:
    return Watch()


@enters
@pytest.mark.parametrize(
    ("form", "memory_format", "built"),
    [
        ("merged", torch.channels_last, 11),  # every adapted layer's weight
        pytest.param("merged", torch.contiguous_format, 11, marks=pytest.mark.slow),  # as test_compile.py in one graph
        ("factored", torch.contiguous_format, 2 * 3),  # both thin matrices of each linear layer
    ],
)
def test_outputs_and_gradients_are_those_of_layer_by_layer(form, memory_format, built, x, watch):
    model = adapt(Net().to(memory_format=memory_format), forward=form)
    alone = layer_by_layer(model)
    expected, output = gradients(alone, x), alone(x)
    run = watch.compile(model)
    torch.testing.assert_close(run(x), output)
    model.zero_grad()
    nn.functional.cross_entropy(run(x), torch.arange(len(x)) % 4).backward()
    assert_same({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, expected)
    assert watch.built == [built]


class Chain(nn.Module):
    """Three linear layers, of which the last runs only where it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def block(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc[1](torch.tanh(self.fc[0](x))))

    def forward(self, x: Tensor, last: bool = False, checkpointing: bool = False) -> Tensor:
        x = checkpoint(self.block, x, use_reentrant=False) if checkpointing else self.block(x)
        return self.fc[2](x) if last else x


def chain(**settings: Any) -> Any:
    """The adapted chain, outside of ``flora.batched``, and what runs it within."""
    model = layer_by_layer(adapt(Chain(), target_modules=r"fc\.\d", **settings))
    return model, flora.batched(model)(model)


def step(run: Any, model: nn.Module, x: Tensor, **how: Any) -> dict[str, Tensor | None]:
    model.zero_grad()
    run(x, **how).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("form", ["merged", "factored"])
def test_a_layer_that_the_region_does_not_use_gets_no_gradient(form, watch):
    model, together = chain(forward=form)
    x = torch.randn(3, 4)
    actual = step(watch.compile(together), model, x)
    assert watch.built[0] > 0
    unused = {name for name, gradient in actual.items() if gradient is None}
    assert unused == {name for name in actual if "fc.2" in name}
    torch.testing.assert_close(actual, step(model, model, x))


@pytest.mark.filterwarnings("ignore:.*checkpoint")
def test_a_checkpointed_part_runs_with_what_was_built_before_it(watch):
    model, together = chain()
    x = torch.randn(3, 4)
    actual = step(watch.compile(together), model, x, checkpointing=True, last=True)
    assert watch.built == [3]
    torch.testing.assert_close(actual, step(model, model, x, last=True))


def test_layers_under_another_autocast_than_the_block_build_their_own(watch):
    torch.set_default_dtype(torch.float32)
    model, together = chain()
    x = torch.randn(3, 4)

    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    def outside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return together(x)

    expected = step(inside, model, x)
    for run in (flora.batched(model)(inside), outside):
        for name, gradient in step(watch.compile(run), model, x).items():
            if (eager := expected[name]) is not None:
                assert (gradient - eager).norm() < 0.02 * eager.norm(), name


def test_parameters_that_are_given_in_their_place_are_used(watch):
    model, _ = chain()
    block, x = flora.batched(model), torch.randn(3, 4)
    others = {name: p.detach() * 2 for name, p in model.named_parameters() if "tucker_core" in name}

    def run(x: Tensor) -> Tensor:
        return torch.func.functional_call(model, others, (x,))

    torch.testing.assert_close(watch.compile(block(run))(x), run(x))


def test_gradients_of_gradients_where_the_back_end_gives_them(watch):
    model, together = chain()
    x = torch.randn(3, 4)
    parameters = [p for name, p in model.named_parameters() if p.requires_grad and "fc.2" not in name]

    def penalty(run: Any) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(run(x).square().sum(), parameters, create_graph=True)
        return torch.autograd.grad(torch.stack([part.square().sum() for part in first]).sum(), parameters)

    torch._dynamo.reset()
    torch.testing.assert_close(penalty(torch.compile(together, backend="eager", fullgraph=True)), penalty(model))


def test_two_models_in_one_region_and_an_exception_on_the_way_leave_nothing_behind(watch):
    (one, _), (two, _) = chain(), chain(scale=0.2)
    first, second, x = flora.batched(one), flora.batched(two), torch.randn(3, 4)
    run = watch.compile(first(second(lambda x: two(one(x)))))
    torch.testing.assert_close(run(x), two(one(x)))
    assert flora.replaced.passes.TRACED == []
    with pytest.raises(RuntimeError):
        run(torch.randn(3, 5))
    assert flora.replaced.passes.TRACED == []
    torch.testing.assert_close(copy.deepcopy(one)(x), one(x))


def test_a_block_in_another_thread_while_one_compiles_is_no_part_of_what_is_compiled():
    model, together = chain()
    x, outputs, entered, compiled = torch.randn(3, 4), [], threading.Event(), threading.Event()

    def eager() -> None:
        with flora.batched(model):
            entered.set()
            compiled.wait(60)
            outputs.append(model(x))
        outputs.append(flora.replaced.passes.RUNNING.get())

    def slowly(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        thread.start()
        entered.wait(60)
        assert flora.replaced.passes.TRACED == []
        return graph

    thread = threading.Thread(target=eager)
    torch._dynamo.reset()
    expected = model(x)
    torch.testing.assert_close(torch.compile(together, backend=slowly)(x), expected)
    compiled.set()
    thread.join()
    torch.testing.assert_close(outputs[0], expected)
    assert outputs[1] is None


@enters
def test_a_region_may_enter_the_block_itself(watch):
    model, _ = chain()
    block, x = flora.batched(model), torch.randn(3, 4)

    def run(x: Tensor) -> Tensor:
        with block:
            return model(x)

    torch.testing.assert_close(watch.compile(run)(x), model(x))
    assert watch.built == [3]
