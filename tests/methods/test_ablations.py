"""The ablations: equal budgets, and exactly one idea taken away."""

import itertools
import math

import numpy as np
import peft
import pytest
import tensorly as tl
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import tucker
from torch import nn

from flora import FloraConfig, FloraLayer
from flora.methods.heads import trained
from flora.methods.rivals import FloraFlatConfig, FloraNocoreConfig, FloraShuffledConfig
from flora.methods.rivals.flora_shuffled import kernel_order
from flora.methods.rivals.matched_ranks import solve_ranks
from tests.methods.families import FAMILIES, adapter

LAYERS = [
    nn.Conv2d(6, 8, 3),
    nn.Conv2d(8, 8, 7, groups=8),
    nn.Conv2d(6, 9, (3, 5), groups=3),
    nn.Conv1d(4, 6, 5),
    nn.Linear(5, 7),
]


def filled(layer, config):
    """The layer with an adapter whose parameters are drawn, and they as arrays."""
    config.target_modules = {"0"}
    adapted = peft.get_peft_model(nn.Sequential(layer), config).base_model.model[0]
    parameters = dict(adapted.tucker_factors["default"].items())
    if isinstance(adapted, FloraLayer):
        parameters = {**adapted.tucker_core["default"], **parameters}
    for parameter in parameters.values():
        nn.init.normal_(parameter)
    return adapted, {name: parameter.detach().double().numpy() for name, parameter in parameters.items()}


def update_of(adapted):
    return adapted.get_delta_weight("default").detach().double().numpy()


def counted(name, model_name, classes=10, **changes):
    with torch.device("meta"):
        model = timm.create_model(model_name, num_classes=classes)
        head = [model.pretrained_cfg["classifier"]]
        adapted = adapter(name, **changes).apply(model, head)
    return trained(adapted.model, head)[0], adapted


# ---------------------------------------------------------------------- budgets


@pytest.mark.parametrize("name", ["flora_flat", "flora_nocore"])
@pytest.mark.parametrize("model", ["convnextv2_atto", "tf_efficientnet_lite0", "resnet18"])
@pytest.mark.parametrize("ranks", [{"r": 6, "kernel_rank": 2}, {"r": 8, "kernel_rank": 2}, {"r": 16, "kernel_rank": 3}])
def test_they_spend_what_flora_spends(name, model, ranks):
    budget, _ = counted("flora", model, **ranks)
    spent, _ = counted(name, model, **ranks)
    assert 0.99 * budget <= spent <= budget


def test_a_given_rank_pattern_is_not_solved_for():
    pattern = [{"pattern": ".*", "rank": 2}]
    spent, adapted = counted("flora_nocore", "resnet18", rank_pattern=pattern)
    with torch.device("meta"):
        model = timm.create_model("resnet18", num_classes=10)
    shapes = [tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert spent == 2 * sum(sum(size for size in shape if size > 1) for shape in shapes)
    assert set(map(tuple, adapted.ranks.values())) == {(2,)}


def test_solved_ranks_are_saved_for_each_layer_by_its_whole_name(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.ModuleDict({"conv": nn.Conv2d(4, 8, 3), "a": nn.ModuleDict({"conv": nn.Conv2d(32, 32, 3)})})

    config = FloraFlatConfig(r=4, target_modules=["conv"])
    model = peft.get_peft_model(build(), config)
    ranks = model.base_model.effective_ranks()
    assert ranks["conv"] != ranks["a.conv"], "or this shows nothing"
    model.save_pretrained(str(tmp_path))
    assert peft.PeftModel.from_pretrained(build(), str(tmp_path)).base_model.effective_ranks() == ranks


layer_costs = st.lists(
    st.tuples(st.integers(1, 4000), st.integers(1, 300), st.integers(0, 20), st.integers(1, 40)), min_size=1, max_size=6
)


@settings(max_examples=60, deadline=None)
@given(layer_costs)
def test_solved_ranks_leave_nothing_that_could_be_spent(layers):
    names = [str(i) for i in range(len(layers))]
    budgets = {n: layer[0] for n, layer in zip(names, layers, strict=True)}
    cost = {n: (lambda r, a=a, b=b: a * r + b * r * r) for n, (_, a, b, _) in zip(names, layers, strict=True)}
    highest = {n: layer[3] for n, layer in zip(names, layers, strict=True)}
    total = sum(budgets.values())
    if sum(cost[n](1) for n in names) > total:
        with pytest.raises(ValueError, match="smallest adapter takes"):
            solve_ranks(budgets, cost, highest)
        return
    ranks = solve_ranks(budgets, cost, highest)
    spent = sum(cost[n](r) for n, r in ranks.items())
    assert all(1 <= ranks[n] <= highest[n] for n in names)
    assert spent <= total
    assert all(spent - cost[n](ranks[n]) + cost[n](ranks[n] + 1) > total for n in names if ranks[n] < highest[n])


# ---------------------------------------------------------------------- flora_flat


@pytest.mark.parametrize("layer", LAYERS)
def test_flat_is_a_matrix_between_outputs_and_everything_else(layer):
    adapted, parts = filled(layer, FloraFlatConfig(scale=0.5, rank_pattern={"0": 3}))
    rows, columns = layer.weight.shape[0], layer.weight[0].numel()
    assert [parts[key].shape for key in ("weight", "weight_0", "weight_1")] == [(3, 3), (rows, 3), (columns, 3)]
    expected = 0.5 * parts["weight_0"] @ parts["weight"] @ parts["weight_1"].T
    np.testing.assert_allclose(update_of(adapted), expected.reshape(layer.weight.shape), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- flora_nocore


@pytest.mark.parametrize("layer", LAYERS)
def test_nocore_is_a_sum_of_outer_products(layer):
    adapted, parts = filled(layer, FloraNocoreConfig(scale=0.5, rank_pattern={"0": 3}))
    shape = layer.weight.shape
    factors = [parts.get(str(mode), np.ones((size, 3))) for mode, size in enumerate(shape)]
    expected = sum(0.5 * _outer([factor[:, r] for factor in factors]) for r in range(3))
    np.testing.assert_allclose(update_of(adapted), expected, rtol=1e-4, atol=1e-5)
    assert sum(p.size for p in parts.values()) == 3 * sum(size for size in shape if size > 1)


def _outer(vectors):
    product = np.ones(())
    for vector in vectors:
        product = np.multiply.outer(product, vector)
    return product


def test_nocore_starts_at_zero_with_outputs_that_can_move():
    model = peft.get_peft_model(nn.Sequential(nn.Conv2d(6, 8, 3)), FloraNocoreConfig(r=8, target_modules=["0"]))
    adapted = model.base_model.model[0]
    held = adapted.tucker_factors["default"]
    assert not adapted.get_delta_weight("default").any()
    (model(torch.randn(2, 6, 5, 5)) ** 2).sum().backward()
    assert held["0"].grad.abs().min() > 0
    assert not held["0"].any()
    assert all(held[mode].any() and not held[mode].grad.any() for mode in "123")


# ---------------------------------------------------------------------- flora_shuffled


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
    held = shuffled.tucker_factors["default"]
    shuffled.tucker_core["default"]["weight"].data = torch.from_numpy(moved.reshape(core.shape)).float()
    for mode in range(layer.weight.dim()):
        if f"weight_{mode}" in held:
            factor = parts[f"weight_{mode}"] if mode < 2 else np.eye(kernel[mode - 2])
            held[f"weight_{mode}"].data = torch.from_numpy(factor).float()
    np.testing.assert_allclose(update_of(shuffled), wanted, rtol=1e-3, atol=1e-4)


def test_at_low_kernel_rank_shuffled_does_not_reach_them():
    generator = np.random.default_rng(0)
    rows, columns = np.hanning(7 + 2)[1:-1], np.hanning(7 + 2)[1:-1]  # a smooth bump: kernel ranks 1 and 1
    update = _outer([generator.normal(size=8), generator.normal(size=6), rows, columns])
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


# ---------------------------------------------------------------------- flora_kernelfree


def test_kernelfree_keeps_the_kernel_whole():
    family = FAMILIES["convnext"]
    base = family.build()
    adapted = adapter("flora_kernelfree", family).apply(family.build(), family.head)
    for name, ranks in adapted.ranks.items():
        shape = tuple(base.get_submodule(name).weight.shape)
        assert ranks[2:] == list(shape[2:]), name
        assert all(rank <= 8 for rank in ranks[:2])
