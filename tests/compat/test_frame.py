"""The trials' frame notices what is wrong, and tells a refusal from a failure."""

import copy
from dataclasses import replace

import peft
import pytest
import torch
from torch import nn

import flora

from . import reference
from .frame import Outcome, Trial, outcome
from .methods import METHODS, Method, delta
from .reference import by_hand, compare_steps, three_steps
from .trials.passes import ALL, Mixed, image_loss, mlp, row_loss


def comes_out(run, method: Method = METHODS[0]) -> Outcome:
    return outcome(Trial("torch", "", run), method)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_update_by_hand_is_what_merging_adds(method):
    base = Mixed()
    model = method.wrap(copy.deepcopy(base), ALL)
    by_layer = {name: dict(parts) for (name, _), parts in method.parameters(model).items()}
    merged = model.merge_and_unload()
    assert sorted(by_layer) == sorted(ALL)
    for name, parts in by_layer.items():
        weight, before = merged.get_submodule(name).weight, base.get_submodule(name).weight
        expected = delta(parts, base.get_submodule(name), before.shape)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(weight - before, expected)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_an_update_that_is_off_by_a_millionth_is_wrong(method, monkeypatch):
    monkeypatch.setattr(reference, "delta", lambda *arguments: delta(*arguments) * (1 + 1e-6))
    came_out = comes_out(lambda method: three_steps(method, Mixed(), ALL, image_loss), method)
    assert came_out.status == "wrong"
    assert came_out.line.startswith("loss of step 0: off by")


def test_a_gradient_that_is_missing_too_large_or_too_many_is_wrong():
    def run(method: Method, spoil) -> None:
        base = mlp()
        model = method.wrap(copy.deepcopy(base), ["0", "2"])
        hand = by_hand(method, base, model)
        spoil(model, hand)
        compare_steps(method, model, hand, row_loss)

    def frozen(model: nn.Module, hand: nn.Module) -> None:
        next(p for name, p in model.named_parameters() if "tucker_core" in name).requires_grad_(False)

    def doubled(model: nn.Module, hand: nn.Module) -> None:
        next(p for p in model.parameters() if p.requires_grad).register_hook(lambda gradient: 2 * gradient)

    def unneeded(model: nn.Module, hand: nn.Module) -> None:
        next(iter(hand.updates.values())).requires_grad_(False)

    lines = [comes_out(lambda m, spoil=spoil: run(m, spoil)).line for spoil in (frozen, doubled, unneeded)]
    assert "none where the reference has one" in lines[0]
    assert "off by 1.0e+00" in lines[1]
    assert "one where the reference has none" in lines[2]


def test_what_is_raised_says_how_a_trial_ended():
    def raises(error: Exception):
        def run(method: Method) -> None:
            raise error

        return run

    def refused_by_flora(method: Method) -> None:
        flora.FloraConfig(r=-1)

    def refused_by_peft(method: Method) -> None:
        peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft.LoraConfig(target_modules=["nowhere"]))

    assert comes_out(lambda method: None) == Outcome("right")
    assert comes_out(raises(AssertionError("off\nby much"))) == Outcome("wrong", "off")
    assert comes_out(raises(ValueError("in /a/folder"))) == Outcome("fails", "ValueError: in …folder")
    assert comes_out(lambda method: torch.ones(2) @ torch.ones(3)).status == "fails"
    assert str(comes_out(refused_by_flora)).startswith("refused: ValueError: r: must be a positive integer")
    assert comes_out(refused_by_peft).status == "refused"


def test_forms_are_forms():
    forms = [method.config(["0"]).forward for method in METHODS if method.is_flora]
    assert forms == ["auto", "merged", "factored"]
    assert replace(METHODS[0], form="factored").config(["0"]).forward == "factored"
