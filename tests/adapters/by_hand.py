"""W + update of bare parameters, written by hand: an oracle that shares no code with the adapters."""

import re
from collections.abc import Sequence
from typing import Any

import peft
import torch
from torch import Tensor, nn

CORE = re.compile(r"base_model\.model\.(.*?)adapted_parameters\.tucker_core\.(\w+)\.(.+)")


def updates(model: peft.PeftModel, adapter: str = "default", scale: float = 1.0) -> dict[str, Tensor]:
    """Name of each adapted bare parameter in the base model -> its update, with a graph to cores and factors."""
    parameters = dict(model.named_parameters())
    found = {}
    for name, core in parameters.items():
        if (match := CORE.fullmatch(name)) is None or match[2] != adapter:
            continue
        update = core
        for mode in range(core.dim()):
            factor = parameters.get(name.replace("tucker_core", "tucker_factors") + f"_{mode}")
            if factor is not None:
                update = torch.tensordot(update, factor, dims=([mode], [1])).movedim(-1, mode)
        found[match[1] + match[3]] = scale * update
    return found


def run(
    base: nn.Module, model: peft.PeftModel, *args: Any, adapters: Sequence[str] = ("default",), **kwargs: Any
) -> Any:
    """What the base model computes with W + the sum of the updates in place of W."""
    weights = {name: parameter.detach() for name, parameter in base.named_parameters(remove_duplicate=False)}
    for adapter in adapters:
        for name, update in updates(model, adapter).items():
            weights[name] = weights[name] + update
    return torch.func.functional_call(base, weights, args, kwargs)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss by the parameters that train; those that it does not reach are left out."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(trained, found, strict=True) if gradient is not None}


def assert_same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Names and values agree, and no gradient is zero throughout."""
    assert ours.keys() == expected.keys()
    assert ours
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(ours[name], gradient, rtol=1e-8, atol=1e-10, msg=name)
