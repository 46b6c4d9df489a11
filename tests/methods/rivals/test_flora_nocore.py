"""flora_nocore: exactly the core is taken away."""

import numpy as np
import peft
import pytest
import torch
from torch import nn

from flora.methods.rivals import FloraNocoreConfig
from tests.methods.rivals.ablated import LAYERS, filled, outer, update_of


@pytest.mark.parametrize("layer", LAYERS)
def test_nocore_is_a_sum_of_outer_products(layer):
    adapted, parts = filled(layer, FloraNocoreConfig(scale=0.5, rank_pattern={"0": 3}))
    shape = layer.weight.shape
    factors = [parts.get(str(mode), np.ones((size, 3))) for mode, size in enumerate(shape)]
    expected = sum(0.5 * outer([factor[:, r] for factor in factors]) for r in range(3))
    np.testing.assert_allclose(update_of(adapted), expected, rtol=1e-4, atol=1e-5)
    assert sum(p.size for p in parts.values()) == 3 * sum(size for size in shape if size > 1)


def test_nocore_starts_at_zero_with_outputs_that_can_move():
    model = peft.get_peft_model(nn.Sequential(nn.Conv2d(6, 8, 3)), FloraNocoreConfig(r=8, target_modules=["0"]))
    adapted = model.base_model.model[0]
    factors = adapted.tucker_factors["default"]
    assert not adapted.get_delta_weight("default").any()
    (model(torch.randn(2, 6, 5, 5)) ** 2).sum().backward()
    assert factors["0"].grad.abs().min() > 0
    assert not factors["0"].any()
    assert all(factors[mode].any() and not factors[mode].grad.any() for mode in "123")
