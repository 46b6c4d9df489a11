"""Ladders: parameters of every rank against the published formulas and against what PEFT builds."""

import copy
import math

import numpy as np
import peft
import pytest
from torch import nn

from flora.methods.ladders import ladders_of
from tests.methods.small import Small, method, outside


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
    "lora_plus": lambda o, i, k, g, r: r * (i * max(k, 1) ** 2 + o),
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
    formula, skips = FORMULAS[name], name in ("lora", "dora", "rslora", "lora_plus")
    layers = {"stem": (24, 3, 5, 1), "depthwise": (24, 24, 3, 24), "point": (32, 24, 1, 1), "up": (96, 32, 0, 1)}
    chosen = method(name)
    model = Small()
    targets = [layer for layer in layers if not (skips and layer == "depthwise")]
    counted = {key: value for key, value in chosen.options.items() if "alpha" not in key}  # which counts for nothing
    config = chosen.config_class(target_modules=targets, **counted)
    for ladder in ladders_of(config, model):
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
        for ladder in ladders_of(config, model):
            counts = [rung.params for rung in ladder.rungs]
            assert counts == sorted(set(counts))
            for rung in ladder.rungs:
                alone = peft.LoKrConfig(target_modules=[ladder.name], r=rung.rank, **options)
                assert outside(peft.get_peft_model(copy.deepcopy(model), alone)) == rung.params
    linear = ladders_of(peft.LoKrConfig(target_modules=["2"], decompose_factor=2), model)[0]
    assert linear.rungs[-1].params == 2 * 2 + 12 * 30  # both sides whole
