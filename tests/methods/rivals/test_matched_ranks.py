"""Ablations spend what FLoRA would, and start as it does."""

import re
from collections import OrderedDict

import peft
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flora.methods.rivals import FloraFlatConfig
from flora.methods.rivals.matched_ranks import solve_ranks
from flora.results import cells
from tests.methods.families import adapter
from tests.methods.rivals.ablated import counted


@pytest.mark.parametrize("name", ["flora_flat", "flora_nocore"])
@pytest.mark.parametrize("model", ["convnextv2_atto", "tf_efficientnet_lite0", "resnet18"])
@pytest.mark.parametrize("ranks", [{"r": 6, "kernel_rank": 2}, {"r": 8, "kernel_rank": 2}, {"r": 16, "kernel_rank": 3}])
def test_they_spend_what_flora_spends(name, model, ranks):
    budget, _ = counted("flora", model, **ranks)
    spent, _ = counted(name, model, **ranks)
    assert 0.99 * budget <= spent <= budget


FORMS = sorted({cell.method for cell in cells.load("structure_ablation").cells})


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_are_compared_start_alike(name):
    """From zero, with only the factor of the outputs moving in the first step: else a start could pass for a form."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(6, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(32, 9)]
    network = nn.Sequential(OrderedDict(body=nn.Sequential(*layers), head=nn.Linear(9, 2)))
    model = adapter(name, r=3).apply(network, ["head"]).model
    before = model(x := torch.randn(4, 6, 6, 6))
    before.square().sum().backward()
    moving = {n for n, p in model.named_parameters() if "tucker_" in n and p.grad.any()}
    zero = {n for n, p in model.named_parameters() if "tucker_" in n and not p.any()}
    outputs = {n for n, _ in model.named_parameters() if re.search(r"tucker_factors\.default\.(weight_)?0$", n)}
    assert moving == zero == outputs
    assert len(outputs) == 3
    with model.disable_adapter():
        assert torch.equal(model(x), before)


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
