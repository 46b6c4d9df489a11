"""UPerNet's parts of our own, against torch's."""

import pytest
import torch
from torch import nn

from flora.models.segmentation import AveragePool
from tests.tasks.segment.made import network


@pytest.mark.parametrize(("size", "count"), [((7, 12), 3), ((16, 16), 6), ((5, 9), 1), ((4, 3), 6)])
def test_deterministic_pooling_is_torchs(size, count):
    maps = torch.randn(2, 5, *size, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 5, count, count, dtype=torch.float64)
    expected = nn.functional.adaptive_avg_pool2d(maps, count)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), maps)
    torch.use_deterministic_algorithms(True)
    try:
        pooled = AveragePool(count)(maps)
        (own,) = torch.autograd.grad((pooled * weights).sum(), maps)
    finally:
        torch.use_deterministic_algorithms(False)
    assert pooled.shape == expected.shape
    assert torch.allclose(pooled, expected)
    assert torch.allclose(own, gradient)


def test_the_decoder_pools_by_it():
    module = network().build(3)
    pools = [part for part in module.modules() if isinstance(part, nn.AdaptiveAvgPool2d)]
    assert len(pools) == 4
    assert all(isinstance(pool, AveragePool) for pool in pools)
    assert [block.layers[0] for block in module.decode_head.psp_modules.blocks] == pools
