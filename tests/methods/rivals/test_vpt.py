"""Visual prompts are tokens of a vision transformer."""

import copy

import numpy as np
import peft
import pytest
import torch
from torch import nn

from flora.methods.rivals import (
    VptConfig,
)
from tests.methods.families import FAMILIES


@pytest.mark.parametrize("deep", [True, False])
def test_prompts_are_tokens_between_the_class_token_and_the_patches(deep):
    vit = FAMILIES["vit"].build().eval()
    plain = copy.deepcopy(vit)
    model = peft.get_peft_model(vit, VptConfig(num_tokens=4, deep=deep)).eval()
    prompts = [b.vpt_prompts["default"] for b in model.base_model.model.blocks if "default" in b.vpt_prompts]
    assert len(prompts) == (3 if deep else 1)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == len(prompts) * 4 * 24
    bound = np.sqrt(6 / (3 * 4 * 4 + 24))
    assert 0.8 * bound < max(p.abs().max().item() for p in prompts) <= bound

    x = torch.randn(2, 3, 16, 16)
    tokens = plain._pos_embed(plain.patch_embed(x))
    lengths = []
    for index, block in enumerate(plain.blocks):
        if index < len(prompts):
            tokens = torch.cat([tokens[:, :1], prompts[index].expand(2, 4, 24), tokens[:, -16:]], dim=1)
        tokens = block(tokens)
        lengths.append(tokens.shape[1])
    assert lengths == [21, 21, 21]
    expected = plain.forward_head(plain.norm(torch.cat([tokens[:, :1], tokens[:, -16:]], dim=1)))
    torch.testing.assert_close(model(x), expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), plain(x))


def test_vpt_refuses_other_models():
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(3, 3)])
    with pytest.raises(ValueError, match="target_modules: vpt needs a vision transformer"):
        peft.get_peft_model(model, VptConfig())
