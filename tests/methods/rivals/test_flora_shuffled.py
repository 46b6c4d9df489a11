"""flora_shuffled: exactly the locality is taken away; flora_kernelfree: the kernel's ranks."""

import itertools
import math

import numpy as np
import pytest
import tensorly as tl
import torch
from tensorly.decomposition import tucker
from torch import nn

from flora import FloraConfig
from flora.methods.heads import trained
from flora.methods.rivals import FloraShuffledConfig
from flora.methods.rivals.flora_shuffled import kernel_order
from tests.methods.families import FAMILIES, adapter
from tests.methods.rivals.ablated import LAYERS, filled, outer, update_of


@pytest.mark.parametrize("layer", LAYERS[:4])
def test_shuffled_is_a_tucker_form_with_its_kernel_positions_elsewhere(layer):
    config = FloraShuffledConfig(r=3, kernel_rank=2, scale=0.5, permutation_seed=7)
    adapted, parts = filled(layer, config)
    shape = tuple(layer.weight.shape)
    core = parts["weight"]
    tensor = 0.5 * core
    for mode, size in enumerate(shape):
        factor = parts.get(f"weight_{mode}")
        if factor is not None:
            tensor = np.moveaxis(np.tensordot(factor, tensor, (1, mode)), 0, mode)
        assert tensor.shape[mode] == size
    positions = list(itertools.product(*[range(size) for size in shape[2:]]))
    order = kernel_order(shape[2:], 7).tolist()
    assert sorted(order) == list(range(len(positions)))
    assert order != sorted(order)
    expected = np.empty(shape)
    for to, origin in enumerate(order):
        expected[(slice(None), slice(None), *positions[to])] = tensor[(slice(None), slice(None), *positions[origin])]
    np.testing.assert_allclose(update_of(adapted), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS[:4])
def test_at_full_kernel_rank_shuffled_reaches_every_update_of_flora(layer):
    kernel = tuple(layer.kernel_size)
    flora, parts = filled(layer, FloraConfig(r=2, kernel_rank=list(kernel)))
    wanted = update_of(flora)
    shuffled, _ = filled(layer, FloraShuffledConfig(r=2, kernel_rank=list(kernel), permutation_seed=3))
    assert shuffled.effective_ranks == flora.effective_ranks

    # Kernel factors at the identity; the core takes the kernel's patterns, in their shuffled places.
    core = parts["weight"]
    for mode in range(2, core.ndim):
        core = np.moveaxis(np.tensordot(parts[f"weight_{mode}"], core, (1, mode)), 0, mode)
    flat = core.reshape(*core.shape[:2], math.prod(kernel))
    order = kernel_order(kernel, 3).numpy()
    moved = np.empty_like(flat)
    moved[..., order] = flat
    factors = shuffled.tucker_factors["default"]
    shuffled.tucker_core["default"]["weight"].data = torch.from_numpy(moved.reshape(core.shape)).float()
    for mode in range(layer.weight.dim()):
        if f"weight_{mode}" in factors:
            factor = parts[f"weight_{mode}"] if mode < 2 else np.eye(kernel[mode - 2])
            factors[f"weight_{mode}"].data = torch.from_numpy(factor).float()
    np.testing.assert_allclose(update_of(shuffled), wanted, rtol=1e-3, atol=1e-4)


def test_at_low_kernel_rank_shuffled_does_not_reach_them():
    generator = np.random.default_rng(0)
    rows, columns = np.hanning(7 + 2)[1:-1], np.hanning(7 + 2)[1:-1]  # a smooth bump: kernel ranks 1 and 1
    update = outer([generator.normal(size=8), generator.normal(size=6), rows, columns])
    order = kernel_order((7, 7), 0).numpy()
    moved = np.empty((8, 6, 49))
    moved[..., order] = update.reshape(8, 6, 49)
    for tensor, reachable in ((update, True), (moved.reshape(8, 6, 7, 7), False)):
        fit = tl.tucker_to_tensor(tucker(tensor, rank=[1, 1, 1, 1]))
        missed = np.linalg.norm(fit - tensor) / np.linalg.norm(tensor)
        assert missed < 1e-6 if reachable else missed > 0.3


def test_shuffled_has_floras_parameters_and_is_flora_without_kernels():
    family = FAMILIES["convnext"]
    counts = []
    for name in ("flora", "flora_shuffled"):
        adapted = adapter(name, family).apply(family.build(), family.head)
        counts.append(trained(adapted.model, family.head)[0])
    assert counts[0] == counts[1]
    layer = nn.Linear(5, 7)
    torch.manual_seed(0)
    plain, _ = filled(layer, FloraConfig(r=2))
    torch.manual_seed(0)
    shuffled, _ = filled(layer, FloraShuffledConfig(r=2))
    np.testing.assert_array_equal(update_of(shuffled), update_of(plain))


def test_one_seed_is_one_order():
    assert torch.equal(kernel_order((7, 7), 1), kernel_order((7, 7), 1))
    assert not torch.equal(kernel_order((7, 7), 1), kernel_order((7, 7), 2))


def test_kernelfree_keeps_the_kernel_whole():
    family = FAMILIES["convnext"]
    base = family.build()
    adapted = adapter("flora_kernelfree", family).apply(family.build(), family.head)
    for name, ranks in adapted.ranks.items():
        shape = tuple(base.get_submodule(name).weight.shape)
        assert ranks[2:] == list(shape[2:]), name
        assert all(rank <= 8 for rank in ranks[:2])
