"""LoTR: layers of one shape share their outer factors."""

import peft
import torch
from torch import nn

from flora.methods.rivals import (
    LotrConfig,
)


def lotr_model():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(6, 4))
    torch.manual_seed(5)
    return peft.get_peft_model(model, LotrConfig(r=2, target_modules=["0", "1", "2", "3", "4"]))


def test_lotr_shares_factors_between_layers_of_one_shape(tmp_path):
    model = lotr_model()
    layers = list(model.base_model.model)
    factors = [layer.tucker_factors["default"] for layer in layers]
    shared = {(i, j) for i in range(5) for j in range(i) if factors[i]["L"] is factors[j]["L"]}
    assert (
        shared == {(1, 0), (4, 2)} == {(i, j) for i in range(5) for j in range(i) if factors[i]["R"] is factors[j]["R"]}
    )
    assert len({id(h["M"]) for h in factors}) == 5
    # three shapes, r (out + in) each, and five cores
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (12 + 10 + 10) + 5 * 4

    for h in factors:
        nn.init.normal_(h["M"])
    x = torch.randn(3, 6)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).zero_grad()
    model(x).sum().backward()
    assert all(h["L"].grad is not None for h in factors)
    model.save_pretrained(str(tmp_path))
    again = lotr_model().base_model.model
    base = nn.Sequential(*[layer.get_base_layer() for layer in again])
    base.load_state_dict(nn.Sequential(*[layer.get_base_layer() for layer in layers]).state_dict())
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(loaded(x), model(x))
    factors = [layer.tucker_factors["default"] for layer in loaded.base_model.model]
    assert factors[0]["L"] is factors[1]["L"]
