"""SSB and SSL: what they compute is a layer whose weight is scaled at its sides."""

import copy

import peft
import pytest
import torch
from torch import nn

from flora.methods import SsbConfig
from tests.methods.families import FAMILIES, adapter


@pytest.mark.parametrize("bias", [True, False])
def test_the_weight_is_scaled_on_both_sides(bias):
    base = nn.Linear(5, 3, bias=bias)
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), SsbConfig(target_modules=["0"]))
    x = torch.randn(4, 5)
    torch.testing.assert_close(model(x), base(x), rtol=0, atol=0)
    inputs, outputs = torch.randn(5), torch.randn(3)
    layer = model.base_model.model[0]
    layer.ssb_inputs["default"].data, layer.ssb_outputs["default"].data = inputs, outputs
    with torch.no_grad():
        base.weight.mul_(inputs).mul_(outputs[:, None])
    torch.testing.assert_close(model(x), base(x))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 5 + 3


def test_ssb_scales_linear_layers_alone():
    with pytest.raises(ValueError, match=r"target_modules: 0 .* is no linear layer"):
        peft.get_peft_model(nn.Sequential(nn.Conv2d(1, 1, 1)), SsbConfig(target_modules=["0"]))


def test_ssl_has_factors_on_the_inputs_of_keys_values_and_the_first_layer_of_the_mlp():
    family = FAMILIES["deberta"]
    model = adapter("ssl", family).apply(family.build(), family.head).model
    found = {
        n.partition(".layer.0.")[2]: p.shape for n, p in model.named_parameters() if ".layer.0." in n and "ia3" in n
    }
    assert found == {
        f"{name}.ia3_l.default": (1, 32)
        for name in ("attention.self.key_proj", "attention.self.value_proj", "intermediate.dense")
    }


def test_ia3_paper_scales_keys_and_values_and_the_inputs_of_the_mlps_second_layer():
    family = FAMILIES["deberta"]
    model = adapter("ia3_paper", family).apply(family.build(), family.head).model
    found = {
        n.partition(".layer.0.")[2]: p.shape for n, p in model.named_parameters() if ".layer.0." in n and "ia3" in n
    }
    assert found == {
        "attention.self.key_proj.ia3_l.default": (32, 1),
        "attention.self.value_proj.ia3_l.default": (32, 1),
        "output.dense.ia3_l.default": (1, 48),
    }
