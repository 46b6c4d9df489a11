"""Budgets: sizes, landings, refusals, and budgets that match another method."""

import copy
import math
import re

import pytest
import torch
import transformers
from torch import nn

from flora.config import matched_method
from flora.errors import ConfigError
from flora.methods import Peft
from flora.methods.budget import Budget
from flora.models import get
from tests.methods.families import ADAPTERS
from tests.methods.small import Small, method, outside

FLOOR = {"lora_flat", "dora_flat"}  # above 2 % on networks with depthwise convolutions


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("2%", 0.02), ("12.5%", 0.125), ("1.33M", 1330000), (1330000, 1330000), ("500k", 500000), ("1.5e3", 1500), (7, 7)],
)
def test_sizes(size, parameters):
    expected = math.floor(parameters * Small.backbone) if parameters < 1 else parameters
    assert Budget(size).parameters(Small(), ["head"], "all") == expected


@pytest.mark.parametrize(
    "size",
    [
        *("2%%", "-1%", "0", "0%", "", "lots", "1.33 MB", "match:", "match:lora:0", "match:lora:x", True, "nan", "inf"),
        *("0*match:lora:1", "-1*match:lora:1", "0.25*", "2*500k", "25% of match:lora:1", "1/4*match:lora:1"),
    ],
)
def test_malformed_sizes_name_the_setting(size):
    with pytest.raises(ValueError, match=r"^adapter\.budget must be"):
        Budget(size)


# ---------------------------------------------------------------------- landings


@pytest.fixture(scope="module")
def networks():
    specs = {name: get(name) for name in ("convnext", "resnet", "efficientnet_lite0", "minilm_l6")}
    return {name: (spec, spec.skeleton(10)) for name, spec in specs.items()}


@pytest.mark.parametrize(
    ("model", "percent"),
    [
        ("convnext", 2),
        ("convnext", 8),
        ("resnet", 2),
        pytest.param("resnet", 8, marks=pytest.mark.slow),
        ("minilm_l6", 2),
        pytest.param("minilm_l6", 8, marks=pytest.mark.slow),
        pytest.param("efficientnet_lite0", 2, marks=pytest.mark.slow),
        pytest.param("efficientnet_lite0", 8, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", ["flora", "lora", "dora", "lora_flat", "dora_flat", "loha", "lokr", "locon_tucker"])
def test_lands_within_one_percent_below(networks, name, model, percent):
    spec, skeleton = networks[model]
    chosen = method(name, f"adapter.budget={percent}%")
    chosen.target_modules = spec.adapter_targets
    head = spec.classifier[0]
    backbone = sum(p.numel() for n, p in skeleton.named_parameters() if not n.startswith(head))
    if name in FLOOR and percent == 2 and model not in ("minilm_l6", "resnet"):
        with pytest.raises(ValueError, match="below the smallest adapter") as refused:
            chosen.apply(copy.deepcopy(skeleton), spec.classifier)
        nearest = int(re.search(r"choose (\d+)$", str(refused.value)).group(1))
        chosen.set_budget(nearest)
        assert_lands(chosen, skeleton, spec.classifier, nearest)
        return
    assert_lands(chosen, skeleton, spec.classifier, math.floor(backbone * percent / 100))


def test_flora_is_a_quarter_of_loras_smallest_on_regular_convolutions(networks):
    spec, skeleton = networks["resnet"]
    smallest = sum(math.prod(w.shape[1:]) + w.shape[0] for n, w in skeleton.named_parameters() if w.dim() == 4)
    with torch.device("meta"):
        lora = method("lora", "adapter.r=1").apply(copy.deepcopy(skeleton), spec.classifier)
    assert outside(lora.model, "modules_to_save.default") == smallest
    assert_lands(
        method("flora", f"adapter.budget={smallest // 4}", "adapter.kernel_rank=1"),
        skeleton,
        spec.classifier,
        smallest // 4,
    )


def assert_lands(chosen, skeleton, head, budget):
    with torch.device("meta"):
        adapted = chosen.apply(copy.deepcopy(skeleton), head)
    assert 0.99 * budget <= outside(adapted.model, "modules_to_save.default") <= budget
    for name, ranks in adapted.ranks.items():
        shape = skeleton.get_submodule(name).weight.shape
        assert max(ranks) <= max(shape[0], math.prod(shape[1:])), name


@pytest.mark.parametrize(("size", "budget"), [("12.77M", 12.77e6), ("25.65M", 25.65e6), ("40.49M", 40.49e6)])
def test_the_published_budgets_of_convnext_large(size, budget):
    spec = get("convnextv2_large")
    with torch.device("meta"):
        adapted = method("flora", f"adapter.budget={size}").apply(spec.skeleton(), spec.classifier)
    assert 0.99 * budget <= outside(adapted.model, "modules_to_save.default") <= budget
    depthwise = [tuple(ranks) for name, ranks in adapted.ranks.items() if "conv_dw" in name]
    assert depthwise == [(4, 1, 2, 2)] * 36  # kernel rank 2 leaves 4 useful output directions
    linears = [ranks[0] for name, ranks in adapted.ranks.items() if "mlp" in name]
    assert len(linears) == 72
    assert max(linears) - min(linears) <= 4  # one rank, and the remainder


def test_the_solution_is_printed_and_recorded_layer_by_layer(capsys):
    adapted = method("lora", "adapter.budget=1234").apply(Small(), ["head"])
    lines = capsys.readouterr().err.strip().splitlines()
    total = int(re.search(r"uniform: ([\d,]+) used", lines[0]).group(1).replace(",", ""))
    rows = [re.fullmatch(r"  (\S+) \[.*\]: rank (\d+), ([\d,]+) parameters", line).groups() for line in lines[1:]]
    assert {name: [int(rank)] for name, rank, _ in rows} == adapted.ranks
    assert set(adapted.ranks) == {"stem", "point", "up", "block.up"}
    assert sum(int(params.replace(",", "")) for *_, params in rows) == total == outside(adapted.model)


# ---------------------------------------------------------------------- FLoRA's own settings


@pytest.mark.parametrize("kernel_rank", [1, 3])
def test_the_kernel_rank_stays_as_configured(kernel_rank):
    chosen = method("flora", "adapter.budget=3000", f"adapter.kernel_rank={kernel_rank}")
    ranks = chosen.apply(Small(), ["head"]).ranks
    assert ranks["stem"][2:] == [kernel_rank, kernel_rank]
    assert ranks["depthwise"][0] <= kernel_rank**2


def test_dora_magnitudes_count():
    adapted = method("flora", "adapter.budget=3000", "adapter.use_dora=true").apply(Small(), ["head"])
    assert 2970 <= outside(adapted.model) <= 3000
    assert sum(p.numel() for n, p in adapted.model.named_parameters() if "magnitude" in n) == 24 + 24 + 32 + 2 * 96


def test_layers_with_several_weights():
    class Attentive(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2)
            self.fc = nn.Linear(16, 4)

    chosen = Peft("flora", "flora.FloraConfig", target_modules=["attention"], r=1)
    chosen.set_budget(1200)
    adapted = chosen.apply(Attentive(), ["fc"])
    trainable = [p.numel() for n, p in adapted.model.named_parameters() if "tucker_" in n]
    assert 1188 <= sum(trainable) <= 1200
    assert set(adapted.ranks) == {"attention.in_proj_weight", "attention.out_proj.weight"}


# ---------------------------------------------------------------------- refusals


def test_below_and_above_name_the_nearest_and_it_works():
    for size, side in ((10, "below the smallest"), (10**6, "above the largest")):
        with pytest.raises(ValueError, match=rf"adapter\.budget={size}, .*{side} adapter") as refused:
            method("flora", f"adapter.budget={size}").apply(Small(), ["head"])
        nearest = int(re.search(r"choose (\d+)$", str(refused.value)).group(1))
        assert outside(method("flora", f"adapter.budget={nearest}").apply(Small(), ["head"]).model) == nearest


def test_a_budget_between_two_sizes_is_refused():
    model = nn.Sequential(nn.Linear(10, 10))
    with pytest.raises(ValueError, match="between two possible sizes, the smaller of 20; choose 20"):
        method("lora", "adapter.budget=39").apply(model, ["none"])


FIXED = {"full", "bitfit", "linear_probe", "ia3", "norm_tuning", "oft", "vpt", "adalora", "lotr"}
FIXED |= {"houlsby", "pfeiffer", "parallel_adapter", "ia3_paper", "ssl", "ssb"}


@pytest.mark.parametrize("name", sorted(FIXED))
def test_methods_without_ranks_refuse(name):
    refused = rf"adapter\.budget: {name} has no ranks that a budget could set layer by layer; leave the budget out$"
    with pytest.raises(ConfigError, match=refused):
        method(name, "adapter.budget=2%")


def test_an_allocation_without_ranks_is_refused_as_well():
    with pytest.raises(ConfigError, match=r"adapter\.allocation: bitfit has no ranks .*; leave the allocation out$"):
        method("bitfit", "adapter.allocation=spectral")


@pytest.mark.parametrize("name", sorted({*ADAPTERS} - FIXED))
def test_all_others_take_a_budget(name):
    assert method(name, "adapter.budget=2%").budget.size == "2%"


def test_ranks_given_besides_are_refused():
    chosen = method("flora", "adapter.budget=2000", "adapter.rank_pattern=[{pattern:stem,rank:2}]")
    with pytest.raises(ValueError, match=r"adapter\.rank_pattern: adapter\.budget sets"):
        chosen.apply(Small(), ["head"])


def test_other_trained_parameters_are_refused():
    with pytest.raises(ValueError, match=r"adapter\.budget: an option of the adapter trains \+272 parameters"):
        method("flora", "adapter.budget=3000", "+adapter.bias=flora_only").apply(Small(), ["head"])


# ---------------------------------------------------------------------- matching another method


def test_match_takes_the_parameters_of_the_other_config():
    bert = transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = transformers.BertForSequenceClassification(bert)
    targets = get("minilm_l6").adapter_targets
    lora = 2 * 6 * (4 * 64 + 2 * 96)  # rank 6: four square projections and two of the MLP per layer

    def matching(size):
        return Budget(size, matched=matched_method).parameters(model, ["classifier"], targets)

    assert matching("match:lora:6") == lora
    assert matching("0.25*match:lora:6") == math.floor(lora / 4)
    assert matching("2 * match:lora:6") == 2 * lora
    assert matching("match:linear_probe") == 0
    assert matching("match:full") == sum(
        p.numel() for n, p in model.named_parameters() if not n.startswith("classifier")
    )
    chosen = method("flora", "adapter.budget=match:lora:6")
    chosen.target_modules = targets
    assert 0.99 * lora <= outside(chosen.apply(model, ["classifier"]).model, "modules_to_save.default") <= lora


def test_a_match_is_what_it_is_given_and_is_applied_to_a_copy():
    model, asked = Small(), []

    def matched(name, rank, targets):
        asked.append((name, rank, targets))
        return Peft("lora", "peft.LoraConfig", ["up"], r=rank)

    expected = 2 * 3 * (32 + 96)  # two layers' names end in up
    assert Budget("match:mine:3", matched=matched).parameters(model, ["head"], ["up"]) == expected
    assert asked == [("mine", 3, ["up"])]
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())


def test_a_match_needs_what_makes_methods():
    with pytest.raises(ValueError, match=r"^adapter\.budget=match:lora:6: nothing here makes the method"):
        Budget("match:lora:6")


@pytest.mark.parametrize("size", ["match:nothing:8", "match:ia3:8"])
def test_an_unknown_match_is_refused(size):
    with pytest.raises(ValueError, match=r"adapter\.budget: no method .* there are adalora, bitfit"):
        Budget(size, matched=matched_method).parameters(Small(), ["head"], "all")
