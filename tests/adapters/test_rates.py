"""Cores and factors with rates of their own: in an optimizer of the user's, and in the trainer."""

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

import flora
from flora.config import cell_id, composed, instantiate_method
from flora.methods import Peft
from flora.training.groups import parameter_groups
from flora.training.settings import TrainerSettings


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2))


def test_a_step_of_sgd_moves_cores_by_the_ratio():
    config = flora.FloraConfig(target_modules=["0"], modules_to_save=["2"], r=2, init_weights=False)
    model = peft.get_peft_model(network(), config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(flora.parameter_groups(model, lr=0.1, core_lr_ratio=4))
    model(torch.randn(2, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = 0.4 if "tucker_core" in name else 0.1
            torch.testing.assert_close(parameter, before[name] - rate * parameter.grad)
        else:
            assert torch.equal(parameter, before[name])


def test_what_has_no_cores_or_no_rate_is_refused():
    lora = peft.get_peft_model(network(), peft.LoraConfig(target_modules=["2"]))
    with pytest.raises(ValueError, match="it trains no core of FLoRA"):
        flora.parameter_groups(lora, 0.1, 4)
    model = peft.get_peft_model(network(), flora.FloraConfig(target_modules=["0"]))
    for ratio in (0, "x", None, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="core_lr_ratio must be numbers above 0"):
            flora.parameter_groups(model, 0.1, ratio)


def test_the_trainers_groups_have_the_ratio_and_the_heads_rate():
    method = Peft("flora", "flora.FloraConfig", ["0"], core_lr_ratio=4.0, r=2)
    adapted = method.apply(network(), ["2"])
    settings = TrainerSettings(epochs=1, lr=0.01, head_lr=0.003)
    names = {id(p): name for name, p in adapted.model.named_parameters()}
    groups = parameter_groups(adapted.model.named_parameters(), ["2"], adapted.lr_scales, settings)
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert {rate for name, rate in rates.items() if "tucker_core" in name} == {0.04}
    assert {rate for name, rate in rates.items() if "tucker_factors" in name} == {0.01}
    assert {rate for name, rate in rates.items() if "modules_to_save" in name} == {0.003}


def test_a_ratio_is_another_run_and_none_is_the_run_of_before():
    assert cell_id(composed(["adapter.core_lr_ratio=4"])) != cell_id(composed([]))
    assert cell_id(composed(["adapter.core_lr_ratio=null"])) == cell_id(composed([]))


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"core_lr_ratio": -1}, "core_lr_ratio must be a number above 0"), ({"core_lr_ratio": True, "r": 2}, "above 0")],
)
def test_a_ratio_that_is_none_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Peft("flora", "flora.FloraConfig", ["0"], **settings)
    with pytest.raises(ValueError, match="lora trains no core"):
        Peft("lora", "peft.LoraConfig", ["2"], core_lr_ratio=2).apply(network(), [])
    with pytest.raises(ValueError, match="b_lr_ratio: flora trains no matrix B of LoRA"):
        Peft("flora", "flora.FloraConfig", ["0"], b_lr_ratio=2, r=2).apply(network(), [])


def test_lora_plus_gives_b_the_rate_that_pefts_helper_gives_it():
    adapter = composed(["adapter=lora_plus", "adapter.b_lr_ratio=4", "adapter.target_modules=all"]).adapter
    adapted = instantiate_method(adapter).apply(network(), ["2"])
    groups = parameter_groups(
        adapted.model.named_parameters(), ["2"], adapted.lr_scales, TrainerSettings(epochs=1, lr=0.01, head_lr=None)
    )
    names = {id(p): name for name, p in adapted.model.named_parameters()}
    ours = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    theirs = create_loraplus_optimizer(adapted.model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=4)
    expected = {names[id(p)]: group["lr"] for group in theirs.param_groups for p in group["params"]}
    matrices = [name for name in ours if "lora_" in name]  # the helper takes a head's bias for one of B
    assert {name: ours[name] for name in matrices} == pytest.approx({name: expected[name] for name in matrices})
    assert all(rate == (0.04 if "lora_B" in name else 0.01) for name, rate in ours.items())
