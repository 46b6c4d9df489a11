"""Activations that are computed anew in the backward pass, whatever ran since the forward pass."""

import copy

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..frame import trial
from ..methods import Method
from ..reference import TIGHT, assert_same_gradients, by_hand, gradients
from .passes import rows, without_gradients


class Checkpointed(nn.Module):
    """Two blocks, each recomputed in the backward pass."""

    def __init__(self, reentrant: bool, convolution: bool = False) -> None:
        super().__init__()
        self.reentrant = reentrant
        torch.manual_seed(2)
        if convolution:
            self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh()) for _ in range(2))
            self.blocks.double()
        else:
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(2)).double()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def _checkpointed(method: Method, between, reentrant: bool = False) -> None:
    """Gradients must be those of the pass that was run, whatever ran between it and its backward pass."""
    for convolution in (False, True):
        base = Checkpointed(reentrant, convolution).train()
        targets = ["blocks.0.0", "blocks.1.0"]
        model = method.wrap(copy.deepcopy(base), targets)
        model.add_adapter("other", method.config(targets))
        reference = by_hand(method, base, model)
        for network in (model, reference):
            x = rows(4, 3, 6, 6) if convolution else rows(4, 12)
            loss = network(x.requires_grad_()).square().mean()
            if network is model:
                between(model, x.detach())
            loss.backward()
        assert_same_gradients(gradients(method, model), gradients(method, reference), TIGHT)


@trial("torch", "non-reentrant checkpointing")
def checkpointing(method: Method) -> None:
    _checkpointed(method, lambda model, x: None)


@trial("torch", "reentrant checkpointing, whose input needs a gradient")
def reentrant_checkpointing(method: Method) -> None:
    _checkpointed(method, without_gradients, reentrant=True)


@trial("torch", "non-reentrant checkpointing; a pass without gradients before backward")
def checkpointing_then_no_grad(method: Method) -> None:
    _checkpointed(method, without_gradients)


@trial("torch", "non-reentrant checkpointing; a pass with the adapter disabled before backward")
def checkpointing_then_disabled(method: Method) -> None:
    def disabled(model, x: Tensor) -> None:
        with model.disable_adapter():
            model(x)
            without_gradients(model, x)

    _checkpointed(method, disabled)


@trial("torch", "non-reentrant checkpointing; a pass of another adapter before backward")
def checkpointing_then_other(method: Method) -> None:
    def other(model, x: Tensor) -> None:
        model.set_adapter("other")
        without_gradients(model, x)
        model(x)
        model.set_adapter("default")

    _checkpointed(method, other)


@trial("torch", "non-reentrant checkpointing; a pass under autocast before backward")
def checkpointing_then_autocast(method: Method) -> None:
    def autocast(model, x: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
            without_gradients(model, x)

    _checkpointed(method, autocast)


@trial("torch", "non-reentrant checkpointing; merge, a pass and unmerge before backward")
def checkpointing_then_merged(method: Method) -> None:
    def merged(model, x: Tensor) -> None:
        model.merge_adapter()
        without_gradients(model, x)
        model.unmerge_adapter()

    _checkpointed(method, merged)


@trial("torch", "two passes, then both backward passes in the other order, with checkpointing")
def crossed_backward(method: Method) -> None:
    base = Checkpointed(False).train()
    model = method.wrap(copy.deepcopy(base), ["blocks.0.0", "blocks.1.0"])
    reference = by_hand(method, base, model)
    for network in (model, reference):
        first, second = (network(rows(4, 12, seed=seed)).square().mean() for seed in (0, 1))
        second.backward()
        first.backward()
    assert_same_gradients(gradients(method, model), gradients(method, reference), TIGHT)
