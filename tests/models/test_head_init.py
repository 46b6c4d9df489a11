"""How the fresh head of a network of timm starts: as timm, as torch or at zero."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flora.config import composed, instantiate
from flora.errors import ConfigError
from flora.methods import heads
from flora.models import TimmModel
from flora.models.vision import _say_large

CLASSES = 10
INPUTS = 1280  # of EfficientNet-Lite0's head


def lite0(*settings):
    """The network of the config with random weights."""
    spec = instantiate(composed(["model=efficientnet_lite0", *settings]).model)
    spec.pretrained = False
    torch.manual_seed(0)
    return spec.build(CLASSES)


def first_loss(model):
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float(F.cross_entropy(model(images), torch.arange(16) % CLASSES))


def test_the_first_loss_is_that_of_chance_unless_timm_draws_the_head():
    assert first_loss(lite0()) == pytest.approx(math.log(CLASSES), rel=0.05)
    assert first_loss(lite0("model.head_init=linear")) == pytest.approx(math.log(CLASSES), rel=0.05)
    assert first_loss(lite0("model.head_init=null")) > 1.5 * math.log(CLASSES)


def test_timm_draws_the_head_for_a_thousand_classes():
    weight = lite0("model.head_init=null").classifier.weight
    assert float(weight.detach().abs().max()) == pytest.approx(1 / math.sqrt(CLASSES), rel=0.01)
    assert float(weight.detach().std()) == pytest.approx(1 / math.sqrt(3 * CLASSES), rel=0.02)


def test_linear_is_uniform_by_the_number_of_inputs_and_leaves_the_rest_alone():
    own, model = lite0("model.head_init=null").state_dict(), lite0("model.head_init=linear")
    bound = 1 / math.sqrt(INPUTS)
    for tensor in (model.classifier.weight, model.classifier.bias):
        assert 0.5 * bound < tensor.abs().max() <= bound
    assert float(model.classifier.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, own[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_zero_starts_each_classifier_of_a_head_at_zero():
    model = nn.ModuleDict({"head": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), "head_dist": nn.Linear(4, 3)})
    heads.start(model, ["head", "head_dist"], 3, "zero")
    last = [*model["head"][1].parameters(), *model["head_dist"].parameters()]
    assert not any(parameter.any() for parameter in last)
    assert model["head"][0].weight.all(), "a hidden layer stays"


@pytest.mark.parametrize(("name", "times"), [("mobilenetv3_small_050", 10), ("resnet10t", None), ("test_vit", None)])
def test_a_head_that_is_far_too_large_is_told_in_one_line(name, times, capsys):
    _say_large.cache_clear()
    for _ in range(2):
        TimmModel(name, pretrained=False).build(CLASSES)
    told = [line for line in capsys.readouterr().err.splitlines() if "random weights" not in line]
    said = f"model {name}: its fresh head of 10 outputs has weights {times} times as large as torch's own"
    assert [line.split(",")[0] for line in told] == ([said] if times else [])
    assert all("model.head_init=linear" in line for line in told)


@pytest.mark.parametrize("start", ["zero", "linear"])
def test_a_head_that_starts_otherwise_needs_no_line(start, capsys):
    _say_large.cache_clear()
    TimmModel("mobilenetv3_small_050", pretrained=False, head_init=start).build(CLASSES)
    assert "fresh head" not in capsys.readouterr().err


@pytest.mark.parametrize("model", ["efficientnet_lite0", "convnext", "resnet", "timm", "internvit_6b"])
def test_another_word_is_refused(model):
    with pytest.raises(ConfigError, match=r"^model\.head_init must be null, zero or linear, got 'foo'$"):
        instantiate(composed([f"model={model}", "model.head_init=foo"]).model)


def test_a_head_without_a_linear_layer_is_refused():
    spec = TimmModel("dla46_c", pretrained=False, head_init="linear")  # classifies by a convolution
    with pytest.raises(ConfigError, match=r"^model\.head_init=linear: the head does not end in a linear .* null$"):
        spec.build(CLASSES)
