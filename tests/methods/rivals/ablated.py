"""Layers adapted by an ablation of FLoRA, and what a whole model then trains."""

import numpy as np
import peft
import timm
import torch
from torch import nn

from flora import FloraLayer
from flora.methods.heads import trained
from tests.methods.families import adapter

LAYERS = [
    nn.Conv2d(6, 8, 3),
    nn.Conv2d(8, 8, 7, groups=8),
    nn.Conv2d(6, 9, (3, 5), groups=3),
    nn.Conv1d(4, 6, 5),
    nn.Linear(5, 7),
]


def filled(layer, config):
    """The layer with an adapter whose parameters are drawn, and they as arrays."""
    config.target_modules = {"0"}
    adapted = peft.get_peft_model(nn.Sequential(layer), config).base_model.model[0]
    parameters = dict(adapted.tucker_factors["default"].items())
    if isinstance(adapted, FloraLayer):
        parameters = {**adapted.tucker_core["default"], **parameters}
    for parameter in parameters.values():
        nn.init.normal_(parameter)
    return adapted, {name: parameter.detach().double().numpy() for name, parameter in parameters.items()}


def update_of(adapted):
    return adapted.get_delta_weight("default").detach().double().numpy()


def counted(name, model_name, classes=10, **changes):
    with torch.device("meta"):
        model = timm.create_model(model_name, num_classes=classes)
        head = [model.pretrained_cfg["classifier"]]
        adapted = adapter(name, **changes).apply(model, head)
    return trained(adapted.model, head)[0], adapted


def outer(vectors):
    product = np.ones(())
    for vector in vectors:
        product = np.multiply.outer(product, vector)
    return product
