"""Alpha follows the rank: 2r in every layer, whatever sets the ranks; numbers hold as they are."""

import math

import pytest

from flora.config import cell_id, composed, semantic_config
from flora.errors import ConfigError
from flora.results import cells
from tests.methods.small import Small, method

TWICE = ("lora", "lora_plus", "dora", "lora_flat", "dora_flat", "moslora", "trilora")
ONCE = ("pissa", "loha", "lokr", "locon_tucker")
FACTORS = {**dict.fromkeys(TWICE, 2.0), **dict.fromkeys(ONCE, 1.0)}
BUDGETS = dict.fromkeys(FACTORS, 3000) | {"pissa": 7 * 128, "lokr": 2000}  # in reach, and not of one rank everywhere


def scales(adapted):
    """What multiplies the update, layer by layer."""
    layers = (m for m in adapted.model.base_model.modules() if hasattr(m, "scaling"))
    return [layer.scaling["default"] for layer in layers]


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("rank", [2, 8])
def test_alpha_is_a_multiple_of_the_rank(name, rank):
    found = scales(method(name, f"adapter.r={rank}").apply(Small(), ["head"]))
    assert len(found) >= 2
    assert set(found) == {FACTORS[name]}


@pytest.mark.parametrize("name", FACTORS)
def test_a_budget_gives_each_layer_the_alpha_of_its_own_rank(name):
    adapted = method(name, f"adapter.budget={BUDGETS[name]}", "adapter.allocation=proportional").apply(
        Small(), ["head"]
    )
    assert len({rank for (rank,) in adapted.ranks.values()}) > 1, "else it shows nothing"
    assert set(scales(adapted)) == {FACTORS[name]}


def test_patterns_of_ranks_are_followed_and_patterns_of_alphas_come_first():
    ranks = "+adapter.rank_pattern=[{pattern:up,rank:3}]"
    assert set(scales(method("lora", ranks).apply(Small(), ["head"]))) == {2.0}
    given = method("lora", ranks, "+adapter.alpha_pattern=[{pattern:block.up,alpha:30}]").apply(Small(), ["head"])
    assert sorted(scales(given)) == [2.0, 2.0, 2.0, 10.0]


def test_a_number_is_the_alpha_of_all_layers():
    for name, key in [("lora", "lora_alpha"), ("lora_flat", "alpha")]:
        assert set(scales(method(name, "adapter.r=4", f"adapter.{key}=16").apply(Small(), ["head"]))) == {4.0}


def test_adalora_takes_the_rank_that_is_left_at_the_end():
    config = method("adalora", "adapter.r=4").apply(Small(), ["head"]).model.peft_config["default"]
    assert (config.lora_alpha, config.init_r, config.target_r) == (8, 6, 4)


def test_rslora_keeps_one_alpha_and_has_a_rate_of_its_own():
    """alpha / sqrt(r) at any rank; the rate makes up for the larger factor: equal to LoRA's steps at r = 8."""
    for rank in (2, 8, 32):
        found = scales(method("rslora", f"adapter.r={rank}").apply(Small(), ["head"]))
        assert set(found) == {16 / math.sqrt(rank)}
    ours, lora = (composed([f"adapter={name}"]).trainer.lr for name in ("rslora", "lora"))
    assert ours * 16 / math.sqrt(8) == pytest.approx(lora * 2, rel=0.02)


def test_lotr_divides_its_one_by_the_rank():
    assert set(scales(method("lotr", "adapter.r=4").apply(Small(), ["head"]))) == {1 / 4}


def test_oft_has_blocks_of_32_or_the_nearest_divisor():
    layers = method("oft").apply(Small(), ["head"]).model.base_model.model
    sizes = {
        name: module.oft_block_size["default"] for name, module in layers.named_modules() if hasattr(module, "oft_R")
    }
    # 3 x 25, 24, 32 and 32 inputs: 75 has the divisors 25 and 75, and 24 is less than a block
    assert sizes == {"stem": 25, "point": 24, "up": 32, "block.up": 32}


@pytest.mark.parametrize("alpha", ["lots", "2s", "-2r", "2r2", "r8"])
def test_another_text_names_the_setting(alpha):
    for name, key in [("lora", "lora_alpha"), ("lora_flat", "alpha"), ("adalora", "lora_alpha")]:
        with pytest.raises(ConfigError, match=rf"adapter\.{key} must be a number or a multiple of the rank"):
            method(name, f"adapter.{key}={alpha}")


def test_a_multiple_excludes_a_scale():
    for name, *more in (("flora", "adapter.alpha=2r"), ("lora_flat", "+adapter.rank_stabilized=true")):
        with pytest.raises(ValueError, match=r"alpha: a multiple of the rank excludes scale"):
            method(name, *more).apply(Small(), ["head"])


def test_alpha_without_an_alpha_is_refused():
    with pytest.raises(ValueError, match="alpha: houlsby has no such setting"):
        method("houlsby", "+adapter.alpha=2r").apply(Small(), ["head"])


# ---------------------------------------------------------------------- in records


def alpha_of(*overrides):
    adapter = semantic_config(composed(overrides))["adapter"]
    return adapter.get("lora_alpha", adapter.get("alpha"))


def test_a_record_holds_the_number_or_says_that_it_follows_each_layer():
    assert [alpha_of("adapter=lora", f"adapter.r={r}") for r in (2, 8, 32)] == [4, 16, 64]
    assert alpha_of("adapter=trilora", "adapter.r=4") == 8
    assert alpha_of("adapter=pissa") == 8
    assert alpha_of("adapter=lora", "adapter.budget=match:lora:8") == "2r"


def test_the_number_typed_is_the_same_run():
    def same(*overrides):
        return cell_id(composed(overrides)) == cell_id(composed([*overrides, "adapter.lora_alpha=16"]))

    assert same("adapter=lora")
    assert not same("adapter=lora", "adapter.r=4")
    assert not same("adapter=lora", "adapter.budget=match:lora:4"), "its layers have alpha 8"


# ---------------------------------------------------------------------- published recipes


def settings(table, name, rank):
    """What records of a table's cells at the paper's scale hold, of a method at a rank."""
    wanted = {f"adapter={name}", f"adapter.r={rank}", "seed=0"}
    return [
        semantic_config(composed(c.overrides)) for c in cells.load(table, "paper").cells if wanted <= {*c.overrides}
    ]


GLUE_ALPHAS = {"mnli": 16, "sst2": 16, "cola": 32, "qqp": 16, "qnli": 32, "rte": 32, "mrpc": 32, "stsb": 32}


@pytest.mark.parametrize("name", ["lora", "trilora", "flora_published_nlu"])
def test_glue_has_the_alphas_of_the_scripts(name):
    found = settings("table3_glue", name, 2)
    alphas = {f["task"]["dataset"]: f["adapter"].get("lora_alpha", f["adapter"].get("alpha")) for f in found}
    assert alphas == GLUE_ALPHAS


def test_glue_deberta_is_what_was_published_and_hands_its_alpha_to_rivals():
    adapter = composed(["experiment=glue_deberta"]).adapter
    assert (adapter.name, adapter.init, adapter.r, adapter.scale, adapter.alpha) == (
        "flora_published_nlu",
        "nlu",
        2,
        None,
        32,
    )
    assert composed(["experiment=glue_deberta", "adapter=lora", "task.dataset=sst2"]).adapter.lora_alpha == 16


def test_commonsense_has_llm_adapters_alpha_and_dropout():
    """Alpha 64 at r = 32 (Subspace-Tuning's README); lora_dropout 0.05 is the default of both finetune.py."""
    for name in ("lora", "dora"):
        (first, *_) = settings("commonsense", name, 32)
        assert (first["adapter"]["lora_alpha"], first["adapter"]["lora_dropout"]) == (64, 0.05)
    (first, *_) = settings("commonsense", "flora_published_llm", 4)
    assert (first["adapter"]["alpha"], first["adapter"]["flora_dropout"], first["adapter"]["init"]) == (8, 0.05, "llm")
    assert composed(["experiment=commonsense_llama_7b", "adapter=lora"]).adapter.lora_dropout == 0.05


def test_llavas_alpha_is_two_r_too():
    """finetune_lora.sh: lora_r 128, lora_alpha 256."""
    assert alpha_of("adapter=lora", "adapter.r=128") == 256
