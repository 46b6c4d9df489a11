"""Layers adapted by a rival, with parameters drawn so that no update is zero."""

import copy

import peft
from torch import nn

# in, out, kernel, groups, stride, padding
CONVS = [(6, 10, 3, 1, 1, 1), (3, 8, 4, 1, 4, 0), (8, 8, 7, 8, 1, 3), (6, 12, 3, 3, 2, 1), (5, 7, 1, 1, 1, 0)]
SHAPES = [nn.Linear(6, 9), nn.Conv2d(4, 6, 3), nn.Conv2d(8, 8, (5, 3), groups=8), nn.Conv1d(4, 6, 3, groups=2)]


def filled(layer, name="0", **config):
    """A layer adapted by a rival, whose parameters are drawn so that no update is zero."""
    kind = config.pop("config")
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), kind(target_modules=[name], **config))
    adapted = model.base_model.model[0]
    factors = adapted.tucker_factors["default"]
    for parameter in factors.values():
        nn.init.normal_(parameter)
    return model, adapted, {key: parameter.detach().double().numpy() for key, parameter in factors.items()}


def update_of(adapted):
    return adapted.get_delta_weight("default").detach().double().numpy()
