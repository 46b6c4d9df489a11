"""What trains alike in one and in several processes."""

import pytest
import torch
from torch import nn

from flora.methods import Peft
from flora.training import parts
from tests.tasks.segment.made import network


@pytest.mark.parametrize("whole", [True, False])
def test_a_norm_without_parameters_is_synchronised_where_the_whole_network_trains(whole):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)).requires_grad_(whole)
    assert isinstance(parts.synchronised(model)[1], nn.SyncBatchNorm) == whole


def test_trained_batch_norms_are_synchronised_and_frozen_ones_are_not():
    spec = network()
    torch.manual_seed(0)
    adapted = Peft("lora", "peft.LoraConfig", "all", r=2).apply(spec.build(3), spec.classifier).model
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    of = {name: norm for name, norm in adapted.named_modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)}
    trained = {name for name, norm in of.items() if norm.weight.requires_grad}
    assert 0 < len(trained) < len(of)
    model = parts.synchronised(adapted)
    for name, norm in model.named_modules():
        if name in of:
            assert isinstance(norm, nn.SyncBatchNorm) == (name in trained), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert before.keys() == model.state_dict().keys()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in adapted.named_parameters() if p.requires_grad
    }
    head = model.base_model.model.decode_head
    used = [
        layer.batch_norm for block in head.modules_to_save["default"].psp_modules.blocks for layer in block.layers[1:]
    ]
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in used), "those that the forward pass goes through"
