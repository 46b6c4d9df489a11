"""A small model with pairs of same-shaped layers, and what tests of the fast path ask of it."""

import copy
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import flora
from flora.adapters import FloraLayer
from flora.adapters.fast.batched import Prepared, _autocast
from flora.replaced import passes


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


enters = pytest.mark.skipif(
    torch.__version__ < "2.12", reason="torch.compile takes no `with` of an object made outside"
)
TARGETS = r"(stem|up|(conv|depthwise|pointwise|fc)\.\d)"


def adapt(base: nn.Module, **settings: Any) -> peft.PeftModel:
    """An adapted copy of the model, which every call runs within ``flora.batched``."""
    settings = {"target_modules": TARGETS, "r": 3, "init_weights": False, "forward": "merged", "scale": 0.7} | settings
    torch.manual_seed(2)
    return together(peft.get_peft_model(copy.deepcopy(base), flora.FloraConfig(**settings)))


def together(model: peft.PeftModel) -> peft.PeftModel:
    """The model, which every call runs within ``flora.batched``."""
    block, run = flora.batched(model), model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with block:
            return run(*args, **kwargs)

    model.block, model.forward = block, forward
    return model


def layer_by_layer(model: peft.PeftModel) -> peft.PeftModel:
    """The same model with every layer building its own weight."""
    twin = copy.deepcopy(model)
    del twin.forward
    return twin


def built(model: peft.PeftModel, *args: Any) -> dict[FloraLayer, Prepared]:
    """What is built for each layer in a call of the model."""
    with model.block:
        model.base_model(*args)
        shared = passes.running()
        found = {layer: shared.prepared_for(layer) for layer in model.block.layers}
    return {layer: prepared for layer, prepared in found.items() if prepared is not None}


def plans_of(model: peft.PeftModel) -> list[Any]:
    """The plans of the last call under the autocast that is on now."""
    return [made.plan for made in model.block._plans[tuple(map(_autocast, model.block.devices))][1]]


def gradients(model: peft.PeftModel, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    F.cross_entropy(model(x), torch.arange(len(x)) % 4).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(actual[name], value, rtol=0, atol=rtol * value.abs().max().item())
