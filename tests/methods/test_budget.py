"""Budgets: counts against formulas and wrapped models, landings, allocations, refusals."""

import copy
import math
import re

import numpy as np
import peft
import pytest
import torch
import transformers
from hydra import compose, initialize_config_dir
from torch import nn

from flora.config import instantiate
from flora.errors import ConfigError
from flora.methods import Peft
from flora.methods.budget import CONFIGS, Budget, Ladder, Rung, climb, ladders
from flora.models import get

FLOOR = {"lora_flat", "dora_flat"}  # above 2 % on networks with depthwise convolutions


def method(name, *overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", [f"adapter={name}", *overrides])
    cfg.adapter.target_modules = "all"
    return instantiate(cfg.adapter)


class Small(nn.Module):
    """A convolution, a depthwise one, a pointwise one and linear layers, one of them in the head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 5)
        self.depthwise = nn.Conv2d(24, 24, 3, groups=24)
        self.point = nn.Conv2d(24, 32, 1)
        self.up = nn.Linear(32, 96)
        self.block = nn.ModuleDict({"up": nn.Linear(32, 96)})  # a name that ends like another
        self.head = nn.Linear(96, 5)

    backbone = (3 * 25 + 1) * 24 + 10 * 24 + 25 * 32 + 2 * 33 * 96


def outside(model, head="head"):
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and f"{head}." not in n)


def clip(sizes, ranks):
    ranks = [min(pair) for pair in zip(sizes, ranks, strict=True)]
    return [min(rank, math.prod(ranks[:n] + ranks[n + 1 :])) for n, rank in enumerate(ranks)]


def tucker(sizes, r, kernel_rank=2):
    ranks = clip(sizes, [r, r, *[kernel_rank] * (len(sizes) - 2)])
    carried = [(size, rank) for size, rank in zip(sizes, ranks, strict=True) if size > 1]
    return int(np.prod(ranks)) + sum(size * rank for size, rank in carried)


# Parameters of a weight [out, in / groups, k, k] or [out, in] at rank r, as the methods' papers and codes have them.
FORMULAS = {
    "flora": lambda o, i, k, g, r: tucker((o, i // g, k, k) if k else (o, i), r),
    "flora_shuffled": lambda o, i, k, g, r: tucker((o, i // g, k, k) if k else (o, i), r),
    "lora": lambda o, i, k, g, r: r * (i * max(k, 1) ** 2 + o),
    "dora": lambda o, i, k, g, r: r * (i * max(k, 1) ** 2 + o) + o,
    "rslora": lambda o, i, k, g, r: r * (i * max(k, 1) ** 2 + o),
    "lora_flat": lambda o, i, k, g, r: r * max(k, 1) ** 2 * (i + o // g),
    "dora_flat": lambda o, i, k, g, r: r * max(k, 1) ** 2 * (i + o // g) + o,
    "loha": lambda o, i, k, g, r: 2 * r * (i // g * max(k, 1) ** 2 + o),
    "locon_tucker": lambda o, i, k, g, r: r * (i // g + o) + (r * r * k * k if k > 1 else 0),
    "trilora": lambda o, i, k, g, r: r * (i // g * max(k, 1) ** 2 + o) + r,
    "moslora": lambda o, i, k, g, r: r * (i // g * max(k, 1) ** 2 + o) + r * r,
    "flora_flat": lambda o, i, k, g, r: r * (i // g * max(k, 1) ** 2 + o) + r * r,
    "flora_nocore": lambda o, i, k, g, r: r * (o + (i // g if i > g else 0) + (2 * k if k > 1 else 0)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_costs_are_the_published_formulas_and_what_peft_builds(name):
    formula, skips = FORMULAS[name], name in ("lora", "dora", "rslora")
    layers = {"stem": (24, 3, 5, 1), "depthwise": (24, 24, 3, 24), "point": (32, 24, 1, 1), "up": (96, 32, 0, 1)}
    chosen = method(name)
    model = Small()
    targets = [layer for layer in layers if not (skips and layer == "depthwise")]
    config = chosen.config_class(target_modules=targets, **chosen.options)
    for ladder in ladders(config, model):
        if ladder.name not in layers:
            continue  # block.up ends like up
        assert [rung.rank for rung in ladder.rungs] == list(range(1, len(ladder.rungs) + 1))
        for rung in ladder.rungs:
            assert rung.params == formula(*layers[ladder.name], rung.rank), (ladder.name, rung)
        for rung in (ladder.rungs[0], ladder.rungs[len(ladder.rungs) // 2], ladder.rungs[-1]):
            alone = copy.deepcopy(config)
            alone.target_modules, alone.rank_pattern = {f"{ladder.name}"}, {".*": rung.pattern}
            alone.exclude_modules = ["block.up"]
            assert outside(peft.get_peft_model(Small(), alone)) == rung.params, (ladder.name, rung)


def test_lokr_counts_what_peft_builds_and_takes_no_product_larger_than_the_matrix():
    model = nn.Sequential(nn.Conv2d(6, 24, 3), nn.Flatten(), nn.Linear(24, 60))
    for options in ({}, {"decompose_factor": 2}, {"decompose_both": True}, {"use_effective_conv2d": True}):
        config = peft.LoKrConfig(target_modules=["0", "2"], **options)
        for ladder in ladders(config, model):
            counts = [rung.params for rung in ladder.rungs]
            assert counts == sorted(set(counts))
            for rung in ladder.rungs:
                alone = peft.LoKrConfig(target_modules=[ladder.name], r=rung.rank, **options)
                assert outside(peft.get_peft_model(copy.deepcopy(model), alone)) == rung.params
    linear = ladders(peft.LoKrConfig(target_modules=["2"], decompose_factor=2), model)[0]
    assert linear.rungs[-1].params == 2 * 2 + 12 * 30  # both sides whole


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("2%", 0.02), ("12.5%", 0.125), ("1.33M", 1330000), (1330000, 1330000), ("500k", 500000), ("1.5e3", 1500), (7, 7)],
)
def test_sizes(size, parameters):
    expected = math.floor(parameters * Small.backbone) if parameters < 1 else parameters
    assert Budget(size).parameters(Small(), ["head"], "all") == expected


@pytest.mark.parametrize(
    "size",
    ["2%%", "-1%", "0", "0%", "", "lots", "1.33 MB", "match:", "match:lora:0", "match:lora:x", True, "nan", "inf"],
)
def test_malformed_sizes_name_the_setting(size):
    with pytest.raises(ValueError, match=r"^adapter\.budget must be"):
        Budget(size)


def test_an_unknown_allocation_is_refused_with_or_without_a_budget():
    for overrides in ((), ("adapter.budget=2%",)):
        with pytest.raises(ConfigError, match=r"adapter\.allocation must be one of uniform"):
            method("lora", "adapter.allocation=fair", *overrides)


# ---------------------------------------------------------------------- landings


@pytest.fixture(scope="module")
def networks():
    specs = {name: get(name) for name in ("convnext", "efficientnet_lite0", "minilm_l6")}
    return {name: (spec, spec.skeleton(10)) for name, spec in specs.items()}


@pytest.mark.parametrize(
    ("model", "percent"),
    [
        ("convnext", 2),
        ("convnext", 8),
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
    if name in FLOOR and percent == 2 and model != "minilm_l6":
        with pytest.raises(ValueError, match="below the smallest adapter") as refused:
            chosen.apply(copy.deepcopy(skeleton), spec.classifier)
        nearest = int(re.search(r"choose (\d+)$", str(refused.value)).group(1))
        chosen.budget = Budget(nearest)
        assert_lands(chosen, skeleton, spec.classifier, nearest)
        return
    assert_lands(chosen, skeleton, spec.classifier, math.floor(backbone * percent / 100))


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


def test_names_that_end_alike_keep_their_own_ranks():
    rows = [
        Ladder(name, f"{name}.weight", (96, 32), (0,), tuple(Rung(r, r, 128 * r) for r in range(1, 33)))
        for name in ("up", "block.up")
    ]
    chosen = climb(rows, lambda row, rung: rung * (2 - row), 128 * 6)  # the second is raised twice as often
    assert [rung.rank for rung in chosen] == [2, 4]
    adapted = method("lora", f"adapter.budget={24 * 32 + 2 * 56 + 128 * 5}").apply(Small(), ["head"])
    wrapped = dict(adapted.model.named_modules())
    for name, ranks in adapted.ranks.items():
        assert wrapped[f"base_model.model.{name}"].lora_A["default"].weight.shape[0] == ranks[0]


# ---------------------------------------------------------------------- allocations


def test_proportional_gives_every_layer_the_same_share_of_its_size():
    model = nn.Sequential(*[nn.Linear(n, n) for n in (32, 64, 256, 512)])
    adapted = method("lora", "adapter.budget=10%", "adapter.allocation=proportional").apply(model, ["none"])
    # r (n + n) = 10 % of n n, to the next rank below, and one more where the remainder pays for it
    for n, (rank,) in zip((32, 64, 256, 512), adapted.ranks.values(), strict=True):
        assert math.floor(0.05 * n) <= max(rank, 2) <= math.floor(0.05 * n) + 2


def test_spectral_follows_the_energy_of_the_weights():
    """Two layers of known rank: the one whose energy is spread gets the ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    basis = [torch.linalg.qr(torch.randn(64, 64))[0] for _ in range(2)]
    spectra = [torch.tensor([10.0] * 3 + [1e-4] * 61), torch.tensor([1.0] * 40 + [1e-4] * 24)]
    for layer, q, spectrum in zip(model, basis, spectra, strict=True):
        layer.weight.data = q @ torch.diag(spectrum) @ q.T
    budget = 128 * 43
    adapted = method("lora", f"adapter.budget={budget}", "adapter.allocation=spectral").apply(model, ["none"])
    assert adapted.ranks == {"0": [3], "1": [40]}
    small = method("lora", f"adapter.budget={128 * 20}", "adapter.allocation=spectral")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    for layer, q, spectrum in zip(model, basis, spectra, strict=True):
        layer.weight.data = q @ torch.diag(spectrum) @ q.T
    ranks = [rank for (rank,) in small.apply(model, ["none"]).ranks.values()]
    kept = [spectrum.square().cumsum(0) / spectrum.square().sum() for spectrum in spectra]
    shares = [float(energy[rank - 1]) for energy, rank in zip(kept, ranks, strict=True)]
    assert sum(ranks) == 20
    assert abs(shares[0] - shares[1]) < 1 / 3  # one rank of the first layer keeps a third


def test_spectral_reads_the_modes_of_a_convolution():
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3))
    kernel = torch.randn(3, 3)
    model[0].weight.data = torch.einsum("oi,hw->oihw", torch.ones(16, 16), kernel)  # rank 1 in every mode
    model[1].weight.data = torch.einsum("oi,hw->oihw", torch.eye(16), kernel)  # rank 16 in its channels
    adapted = method("flora", "adapter.budget=572", "adapter.allocation=spectral").apply(model, ["none"])
    assert adapted.ranks["0"][:2] == [1, 1]
    assert adapted.ranks["1"][0] > 5


def test_spectral_needs_values():
    with pytest.raises(ValueError, match=r"adapter\.allocation=spectral reads the pretrained weights"):
        method("lora", "adapter.budget=2000", "adapter.allocation=spectral").apply(Small().to("meta"), ["head"])


def test_solving_changes_neither_the_weights_nor_the_generator():
    model = Small()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    chosen = method("flora", "adapter.budget=2000", "adapter.allocation=spectral")
    config = chosen.config_class(target_modules=["stem", "point"], modules_to_save=["head"], **chosen.options)
    chosen.budget.solve(config, model, ["head"], "all")
    assert torch.equal(torch.get_rng_state(), state)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


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

    chosen = Peft("flora", "flora.FloraConfig", 1.0, 1.0, target_modules=["attention"], budget=1200, r=1)
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


FIXED = ("ia3", "bitfit", "norm_tuning", "full", "linear_probe", "adalora", "lotr")


@pytest.mark.parametrize("name", FIXED)
def test_methods_without_ranks_refuse(name):
    with (
        initialize_config_dir(str(CONFIGS), version_base="1.3"),
        pytest.raises(ConfigError, match=rf"adapter\.budget: {name} has no ranks"),
    ):
        instantiate(compose("train", [f"adapter={name}", "adapter.budget=2%"]).adapter)


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
    assert Budget("match:lora:6").parameters(model, ["classifier"], targets) == lora
    assert Budget("match:linear_probe").parameters(model, ["classifier"], targets) == 0
    assert Budget("match:full").parameters(model, ["classifier"], targets) == sum(
        p.numel() for n, p in model.named_parameters() if not n.startswith("classifier")
    )
    chosen = method("flora", "adapter.budget=match:lora:6")
    chosen.target_modules = targets
    found = outside(chosen.apply(model, ["classifier"]).model, "modules_to_save.default")
    assert 0.99 * lora <= found <= lora


@pytest.mark.parametrize("size", ["match:nothing:8", "match:ia3:8"])
def test_an_unknown_match_is_refused(size):
    with pytest.raises(ValueError, match=r"adapter\.budget: no method .* there are adalora, bitfit"):
        Budget(size).parameters(Small(), ["head"], "all")
