"""Images in channels-last order: the same run but for rounding."""

import pytest
import torch
from torch import nn

from flora.errors import ConfigError
from flora.methods import Full
from flora.methods.base import load
from flora.methods.peft import Peft
from flora.training import TrainerSettings, layout
from tests.models.test_feature_maps import Summed, random_model
from tests.training.test_capture import logged
from tests.training.test_run import lora, toy_run

METHODS = [Full("full"), lora(), Peft("flora", "flora.FloraConfig", r=2, kernel_rank=2)]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_run_in_channels_last_has_the_same_results(tmp_path, method):
    plain, run = (toy_run(tmp_path / str(how), method, channels_last=how, log_every=1) for how in (False, True))
    before, after = plain.train(), run.train()
    assert after.metrics["accuracy"] == pytest.approx(before.metrics["accuracy"], abs=0.01)
    assert len(logged(before)) > 0
    assert logged(after) == pytest.approx(logged(before), rel=1e-3)


def test_frozen_convolutions_and_images_are_reordered_and_trained_weights_are_not():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3))
    model[0].requires_grad_(False)
    seen = []
    for conv in model:
        conv.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0], output]))
    images = torch.randn(2, 3, 16, 16)
    expected = model(images)
    seen.clear()
    layout.channels_last(model)
    torch.testing.assert_close(model(images), expected)
    assert [conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in model] == [True, False, False]
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in seen)


def test_features_of_a_detector_are_reordered():
    network = Summed(random_model("resnet18")).build(2).backbone
    layout.channels_last(nn.ModuleDict({"backbone": network}))
    assert all(level.is_contiguous(memory_format=torch.channels_last) for level in network(torch.randn(2, 3, 64, 64)))


def test_what_is_saved_is_loaded_without_it(tmp_path):
    run = toy_run(tmp_path, Full("full"), channels_last=True)
    trained = run.train().adapted.model.eval()
    run.method.save(trained, tmp_path / "saved")
    model = load(run.model.build(3), run.model.classifier, tmp_path / "saved").model.eval()
    images = run.model.normalize(torch.randint(0, 256, (4, 3, 8, 8)))
    torch.testing.assert_close(model(images), trained(images), rtol=1e-4, atol=1e-5)


def test_a_value_that_is_no_switch_is_refused():
    with pytest.raises(ConfigError, match=r"trainer\.channels_last must be true or false"):
        TrainerSettings(epochs=1, lr=1, channels_last="yes")
