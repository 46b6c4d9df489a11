"""What belongs to one pass of the model must not decide another: exceptions, checkpointing, threads, copies."""

import copy
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from ..frame import trial
from ..methods import Method
from ..reference import TIGHT, assert_close, by_hand, compare_steps, three_steps

ALL = ["conv", "up", "mlp.0", "mlp.2", "mlp.4"]


def mlp(act: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(1)
    act = act or nn.Tanh()
    return nn.Sequential(nn.Linear(12, 16), act, nn.Linear(16, 16), act, nn.Linear(16, 6)).double()


class Mixed(nn.Module):
    """Convolutions and linear layers, with activations to put in place of each other."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.up, self.mlp = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 1), mlp(act)
        self.act = act or nn.Tanh()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.act(self.up(self.act(self.conv(x)))).mean((2, 3)))


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def image_loss(network: nn.Module) -> Tensor:
    return network(rows(4, 3, 6, 6)).square().mean()


def row_loss(network: nn.Module) -> Tensor:
    return network(rows(4, 12)).square().mean()


def without_gradients(model, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


# ---------------------------------------------------------------------- in-place operations


@trial("torch", "in-place ReLU after each adapted layer, all-linear and convolutions")
def relu_in_place(method: Method) -> None:
    three_steps(method, Mixed(nn.ReLU(inplace=True)), ALL, image_loss)


class InPlace(nn.Module):
    """Changes the outputs of its layers in each usual way."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(5)).double()
        self.scale = nn.Parameter(rows(12, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d, e = self.layers
        x = a(x)
        x += 1.0
        x = b(x)
        x *= self.scale
        x = c(x)
        x.masked_fill_(x > 1, 0.5)
        x = d(x)
        x[:, :3] = 0.25
        return torch.nn.functional.dropout(e(x), 0.0, inplace=True).clamp_(-3, 3)


@trial("torch", "+=, *=, masked_fill_, indexed writes, clamp_ on outputs of adapted layers")
def other_operations_in_place(method: Method) -> None:
    torch.manual_seed(1)
    three_steps(method, InPlace(), [f"layers.{i}" for i in range(5)], row_loss)


# ---------------------------------------------------------------------- passes that end early


@contextmanager
def ending(layer: nn.Module, error: type[BaseException]):
    """Within it, every pass ends with an error when it comes to a layer."""

    def end(*_: object) -> None:
        raise error("in the middle of a pass")

    hook = layer.register_forward_pre_hook(end)
    try:
        yield
    finally:
        hook.remove()


def _recovers(method: Method, error: type[BaseException], keeps_graph: bool) -> None:
    base = Mixed()
    model = method.wrap(copy.deepcopy(base), ALL)
    model.add_adapter("other", method.config(ALL))
    inner = model.get_base_model().mlp[3]

    def interrupt() -> None:
        with ending(inner, error), suppress(error), torch.set_grad_enabled(keeps_graph):
            image_loss(model)

    images = rows(4, 3, 6, 6)
    interrupt()
    compare_steps(method, model, by_hand(method, base, model), image_loss)
    interrupt()
    with model.disable_adapter():
        assert_close(model(images), base(images), TIGHT, "output without adapter after an interrupted pass")
    interrupt()
    model.set_adapter("other")
    assert_close(model(images), by_hand(method, base, model, "other")(images), TIGHT, "output of the other adapter")
    interrupt()
    with torch.no_grad():
        for parts in method.parameters(model, "other").values():
            for part in parts.values():
                part.mul_(1.5)
    assert_close(model(images), by_hand(method, base, model, "other")(images), TIGHT, "output of changed parameters")
    interrupt()
    expected = by_hand(method, base, model, "other")(images)
    assert_close(model.merge_and_unload()(images), expected, TIGHT, "merged output after an interrupted pass")


@trial("torch", "an exception in the middle of a forward pass; then training, disable, set_adapter, merge")
def exception_in_forward(method: Method) -> None:
    _recovers(method, RuntimeError, keeps_graph=True)


@trial("torch", "KeyboardInterrupt in the middle of a forward pass; then the same")
def interrupt_in_forward(method: Method) -> None:
    _recovers(method, KeyboardInterrupt, keeps_graph=True)


@trial("torch", "an exception in the middle of a pass without gradients; then the same")
def exception_in_evaluation(method: Method) -> None:
    _recovers(method, RuntimeError, keeps_graph=False)


class Bare(nn.Module):
    """Bare parameters, as mixtures of experts hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({"inner": Experts()})
        self.last = nn.Linear(12, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.experts["inner"](x))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Tanh()
        self.weights = nn.Parameter(rows(3, 12, 12, seed=5))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(torch.einsum("noi,bi->bo", self.weights, x))


@trial("torch", "an exception while bare parameters are replaced: the base's are the base's again", skipped=("LoRA",))
def exception_with_bare_parameters(method: Method) -> None:
    base = Bare()
    model = method.wrap(copy.deepcopy(base), ["last"], target_parameters=["inner.weights"])
    for error in (RuntimeError, KeyboardInterrupt):
        with ending(model.get_base_model().experts["inner"].act, error), suppress(error):
            row_loss(model)
        with model.disable_adapter():
            own = model.get_base_model().experts["inner"].weights
            assert torch.equal(own, base.experts["inner"].weights), "the base's parameter is not the base's"
            assert_close(model(rows(4, 12)), base(rows(4, 12)), TIGHT, "output without adapter")
        compare_steps(method, model, by_hand(method, base, model), row_loss)


# ---------------------------------------------------------------------- hooks, unused layers, saved tensors


@trial("torch", "hooks on base layers, registered after the first pass")
def late_hooks(method: Method) -> None:
    base = Mixed()
    model = method.wrap(copy.deepcopy(base), ALL)
    image_loss(model)
    seen = []
    for name in ALL:
        layer = model.get_base_model().get_submodule(name)
        layer.get_base_layer().register_forward_hook(lambda module, args, output: seen.append(module))
    image_loss(model)
    assert len(seen) == len(ALL), f"{len(seen)} of {len(ALL)} hooks ran"


class Unused(nn.Module):
    """Its second layer is left out, as LayerDrop leaves layers out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(3)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[2](torch.tanh(self.layers[0](x)))


@trial("torch", "layers that a pass leaves out get no gradient, and AdamW does not move them")
def unused_layers(method: Method) -> None:
    torch.manual_seed(1)
    base = Unused()
    model = three_steps(method, base, [f"layers.{i}" for i in range(3)], row_loss)
    before = {key: value.clone() for key, value in model.state_dict().items() if "layers.1." in key}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    row_loss(model).backward()
    optimiser.step()
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value), f"{key} was moved"


@trial("torch", "autograd.graph.save_on_cpu, and saved tensors packed by a hook")
def saved_tensors(method: Method) -> None:
    def loss(network: nn.Module) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            first = image_loss(network)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
            return first + image_loss(network)

    three_steps(method, Mixed(), ALL, loss)


@trial("torch", "gradients accumulated over several passes, with an evaluation between")
def accumulation(method: Method) -> None:
    def loss(network: nn.Module) -> Tensor:
        total = image_loss(network)
        without_gradients(network, rows(2, 3, 6, 6, seed=4))
        return total + network(rows(4, 3, 6, 6, seed=5)).mean()

    three_steps(method, Mixed(), ALL, loss)


@trial("torch", "second derivatives: a gradient penalty")
def gradient_penalty(method: Method) -> None:
    def loss(network: nn.Module) -> Tensor:
        x = rows(4, 3, 6, 6).requires_grad_()
        (slope,) = torch.autograd.grad(network(x).square().mean(), x, create_graph=True)
        return slope.square().sum()

    three_steps(method, Mixed(), ALL, loss)
