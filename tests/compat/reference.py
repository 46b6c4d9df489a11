"""A network with adapters, by hand: every targeted weight is W + delta, by plain torch whenever it is read."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .methods import Method, delta

# What a network computes, given the network: a loss. Must draw the same random numbers every time.
Loss = Callable[[nn.Module], Tensor]
TIGHT, SINGLE = 1e-8, 2e-4  # relative errors of float64 and float32


class Update(nn.Module):
    """Adds the update of an adapter to a weight."""

    def __init__(self, base: nn.Module, parts: dict[str, Tensor]) -> None:
        super().__init__()
        self.parts = nn.ParameterDict({f"p{key}": nn.Parameter(part.detach().clone()) for key, part in parts.items()})
        self.base = [base]  # in a list, so that it is no child

    def forward(self, weight: Tensor) -> Tensor:
        parts = {key[1:]: part for key, part in self.parts.items()}
        return (weight + delta(parts, self.base[0], weight.shape)).to(weight.dtype)


def by_hand(method: Method, base: nn.Module, adapted: nn.Module, adapter: str = "default") -> nn.Module:
    """A copy of the base network, with the updates that the adapted one has now.

    Args:
        method: whose adapter it is.
        base: the network as it was before adapting.
        adapted: the adapted one.
        adapter: name of the adapter.
    """
    reference = copy.deepcopy(base).requires_grad_(False)
    reference.updates = {}  # type: ignore[assignment]
    for (name, key), parts in method.parameters(adapted, adapter).items():
        name = name.removesuffix("adapted_parameters").rstrip(".")
        owner, attribute = _owner(reference.get_submodule(name), key)
        update = Update(owner, parts)
        parametrize.register_parametrization(owner, attribute, update)
        reference.updates[name, key] = update
    assert reference.updates, "nothing is adapted"
    return reference


def _owner(layer: nn.Module, key: str) -> tuple[nn.Module, str]:
    """The module that holds a weight; dots in a weight's name are underscores in a key."""
    if key.startswith("out_proj_"):
        return layer.out_proj, key.removeprefix("out_proj_")
    return layer, key


def gradients(
    method: Method, network: nn.Module, adapter: str = "default"
) -> dict[tuple[str, str, str], Tensor | None]:
    """Gradients of an adapted network or of a reference: by layer, weight and part."""
    if hasattr(network, "updates"):
        held = {place: {k[1:]: p for k, p in update.parts.items()} for place, update in network.updates.items()}
    else:
        held = method.parameters(network, adapter)
    return {
        (name.removesuffix("adapted_parameters").rstrip("."), key, part): None if p.grad is None else p.grad.clone()
        for (name, key), parts in held.items()
        for part, p in parts.items()
    }


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "output", floor: float = 0.0) -> None:
    """Norm of the difference, relative to that of what is expected (or to a floor)."""
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    error = (actual.detach().double() - expected.detach().double()).norm().item()
    scale = max(expected.detach().double().norm().item(), floor)
    assert error <= tolerance * scale, f"{what}: off by {error / (scale or 1):.1e}"


def assert_same_gradients(
    actual: dict[Any, Tensor | None], expected: dict[Any, Tensor | None], tolerance: float
) -> None:
    """All gradients alike; those that are small beside the largest are held to a thousandth of that."""
    assert actual.keys() == expected.keys(), "other parameters are trained than were adapted"
    norms = [gradient.norm().item() for gradient in expected.values() if gradient is not None]
    assert norms, "the reference has no gradient"
    assert max(norms) > 0, "the reference has no gradient"
    for key, gradient in expected.items():
        what = f"gradient of {'.'.join(key)}"
        own = actual[key]
        if gradient is None or own is None:
            assert gradient is not None or own is None, f"{what}: one where the reference has none"
            assert own is gradient, f"{what}: none where the reference has one"
            continue
        assert_close(own, gradient, tolerance, what, floor=1e-3 * max(norms))


def three_steps(
    method: Method,
    model: nn.Module,
    targets: Any,
    loss: Loss,
    *,
    tolerance: float | None = None,
    lr: float = 0.05,
    steps: int = 3,
    **settings: Any,
) -> Any:
    """Train an adapter and its reference side by side; losses and gradients must agree. Gives the adapted model.

    In double precision, unless the tolerance says otherwise.
    """
    if tolerance is None:
        model, tolerance = model.double(), TIGHT
    adapted = method.wrap(copy.deepcopy(model), targets, **settings)
    reference = by_hand(method, model, adapted)
    adapted.train(model.training)
    compare_steps(method, adapted, reference, loss, tolerance, lr, steps)
    return adapted


def compare_steps(
    method: Method,
    adapted: Any,
    reference: nn.Module,
    loss: Loss,
    tolerance: float = TIGHT,
    lr: float = 0.05,
    steps: int = 3,
) -> None:
    """Steps of gradient descent on both; what they compute must agree."""
    networks = (adapted, reference)
    optimisers = [torch.optim.SGD([p for p in n.parameters() if p.requires_grad], lr=lr) for n in networks]
    for step in range(steps):
        losses = []
        for network, optimiser in zip(networks, optimisers, strict=True):
            optimiser.zero_grad()
            torch.manual_seed(step)
            losses.append(loss(network))
            losses[-1].backward()
        assert_close(*losses, tolerance, f"loss of step {step}")
        assert_same_gradients(*(gradients(method, network) for network in networks), tolerance)
        for optimiser in optimisers:
            optimiser.step()


class Apart(nn.Module):
    """A linear layer that cannot be added to, with the output of the update beside its own."""

    def __init__(self, base: Any, parts: dict[str, Tensor]) -> None:
        super().__init__()
        self.base = base
        self.update = Update(base, parts)

    def forward(self, x: Tensor) -> Tensor:
        parts = {key[1:]: part for key, part in self.update.parts.items()}
        weight = delta(parts, nn.Linear(1, 1), torch.Size((self.base.out_features, self.base.in_features)))
        return self.base(x) + nn.functional.linear(x.to(weight.dtype), weight).to(x.dtype)


def by_hand_apart(method: Method, base: nn.Module, adapted: nn.Module, adapter: str = "default") -> nn.Module:
    """As ``by_hand``, of linear layers whose weights are quantised: op(x, W) + x delta^T; takes the base itself."""
    base.requires_grad_(False)
    base.updates = {}  # type: ignore[assignment]
    for (name, key), parts in method.parameters(adapted, adapter).items():
        owner, _, child = name.rpartition(".")
        layer = Apart(base.get_submodule(name), parts)
        setattr(base.get_submodule(owner), child, layer)
        base.updates[name, key] = layer.update
    assert base.updates, "nothing is adapted"
    return base
