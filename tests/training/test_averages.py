"""Moving averages against a plain loop, and rates that fall from layer to layer."""

import pytest
import timm
import torch

from flora.errors import ConfigError
from flora.methods import Full
from flora.training.groups import layer_scales
from tests.training.test_run import VTAB, toy_run


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_average_is_that_of_the_steps_and_is_what_is_kept(tmp_path, monkeypatch):
    seen = []
    from flora.training.ema import Ema

    take = Ema.on_step_end

    def watch(self, args, state, control, **kwargs):
        seen.append(torch.cat([p.detach().flatten().clone() for p in self.parameters]))
        take(self, args, state, control, **kwargs)

    monkeypatch.setattr(Ema, "on_step_end", watch)
    run = toy_run(tmp_path, Full("full"), VTAB, max_steps=6, ema_decay=0.5)
    expected = weights(run._base())
    outcome = run.train()
    for step, weight in enumerate(seen, 1):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    assert torch.allclose(weights(outcome.adapted.model), expected, atol=1e-6)
    assert not torch.allclose(expected, seen[-1], atol=1e-4)


def test_what_the_best_epoch_was_measured_with_is_what_is_restored(tmp_path):
    run = toy_run(tmp_path, Full("full"), epochs=4, ema_decay=0.9)
    outcome = run.train()
    best = max(e["eval_accuracy"] for e in outcome.trainer.state.log_history if "eval_accuracy" in e)
    assert outcome.trainer.evaluate(run.splits.validation)["eval_accuracy"] == best


def test_rates_fall_from_the_last_layer_to_the_first():
    model = timm.create_model("resnet18", num_classes=3)
    scales = layer_scales(model, 0.5)
    assert set(scales) == {name for name, _ in model.named_parameters()}
    assert scales["fc.weight"] == 1
    assert scales["conv1.weight"] == min(scales.values()) < 0.5**3
    blocks = [scales[f"layer{i}.0.conv1.weight"] for i in range(1, 5)]
    assert blocks == sorted(blocks)
    assert layer_scales(model, 1) == {}


def test_networks_without_known_layers_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="layer_decay"):
        toy_run(tmp_path, Full("full"), max_steps=1, layer_decay=0.5).train()
