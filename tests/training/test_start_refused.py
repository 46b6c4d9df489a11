"""The start from gradients where it cannot be: one line says why, and what to do."""

import pytest
import torch

import flora
from flora.errors import ConfigError
from flora.methods import Peft
from flora.methods.gradient import GradientSettings
from tests.training.test_run import ToyModel, toy_run
from tests.training.test_start import LOOK, method


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: flora.FloraConfig(init="gradient"), 'init="zero_output", then call flora.init_from_gradients'),
        (lambda: GradientSettings(batches=0), r"adapter\.gradient\.batches must be a whole number from 1 on, got 0"),
        (lambda: GradientSettings(head_steps=None), r"gradient\.head_steps must be a whole number from 0 on, got None"),
        (lambda: GradientSettings(put_back=1), r"adapter\.gradient\.put_back must be true or false, got 1"),
        (lambda: Peft("lora", "peft.LoraConfig", init="gradient"), r"init=gradient is a start of FLoRA's .* lora has"),
        (lambda: Peft("lora", "peft.LoraConfig").set_budget(None, "gradient"), "allocation=gradient shares a budget"),
        (lambda: method(budget=300).apply(ToyModel().build(3), ["7.fc"]), "reads gradients of training data"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_runs_that_cannot_have_it_end_with_a_line(tmp_path):
    shuffled = Peft("flora_shuffled", "flora.methods.FloraShuffledConfig", "all", r=2, init="gradient")
    with pytest.raises(ConfigError, match=r"adapter\.init=gradient: .* is not a Tucker form of W"):
        toy_run(tmp_path, shuffled, max_steps=1).train()
    run = toy_run(tmp_path, method(), max_steps=1)
    object.__setattr__(run.settings, "distributed", "fsdp")  # which only several processes may ask for
    with pytest.raises(ConfigError, match="take trainer=ddp"):
        run.train()
    silent = toy_run(tmp_path, method(), max_steps=1)
    silent.task.loss = lambda outputs, targets, smoothing: outputs.sum() * 0
    with pytest.raises(ConfigError, match=r"adapter\.init=gradient: the gradient of .* is zero"):
        silent.train()
    with pytest.raises(ConfigError, match="the head alone diverges at a rate of 1e"):
        toy_run(tmp_path, method(), max_steps=1, head_lr=1e30).train()


@pytest.mark.parametrize("budget", [None, 300], ids=["start", "ranks"])
def test_a_head_at_zero_lets_no_gradient_pass_and_is_to_be_trained_longer(tmp_path, budget):
    """As EfficientNet-Lite0's head starts; the first of its steps is at a rate of zero, as warm-up has it."""
    run = toy_run(tmp_path, method(budget=budget), max_steps=1)
    made = run.model.build

    def build(*arguments, **options):
        network = made(*arguments, **options)
        torch.nn.init.zeros_(network[7].fc.weight)
        return network

    run.model.build = build
    for steps in (0, 1):
        run.method.set_gradient(**LOOK | {"head_steps": steps})
        run._starts.clear()
        with pytest.raises(ConfigError, match=r"the head is at zero, .*: raise adapter\.gradient\.head_steps"):
            run.train()
    run.method.set_gradient(**LOOK)
    run._starts.clear()
    assert run.train().trainer.execution["start"]["kept"] > 0
