"""OFT rotates, and runs as it merges."""

import copy

import peft
import pytest
import torch
from torch import nn

from flora.methods.rivals import (
    OftConfig,
)


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 6, 3, padding=1, stride=2), nn.Conv2d(8, 6, 1), nn.Linear(8, 6)])
def test_oft_rotates_and_runs_as_it_merges(layer):
    config = OftConfig(target_modules=["0"], oft_block_size=4, use_cayley_neumann=False)
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
    linear = isinstance(layer, nn.Linear)
    x = torch.randn(2, 5, 5, 8) if linear else torch.randn(2, 8, 7, 7)
    torch.testing.assert_close(model(x), layer(x))
    nn.init.normal_(model.base_model.model[0].oft_R["default"].weight, std=0.3)
    turned = model(x).detach()
    assert (turned - layer(x)).abs().max() > 0.05
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), turned, rtol=1e-4, atol=1e-5)
    # A rotation keeps the angles between the filters.
    before, after = layer.weight.detach().flatten(1), merged[0].weight.detach().flatten(1)
    torch.testing.assert_close(after @ after.T, before @ before.T, rtol=1e-4, atol=1e-5)
