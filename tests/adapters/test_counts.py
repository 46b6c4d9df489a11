"""Parameter counts: the adapter's own against counts written out here, and both against known figures."""

import copy
import functools
import math

import peft
import pytest
import timm
import torch
import transformers
from torch import nn

import flora


def adapter_parameters(model: nn.Module, config: flora.FloraConfig) -> int:
    wrapped = peft.get_peft_model(model, config)
    return sum(p.numel() for name, p in wrapped.named_parameters() if ".tucker_" in name)


@functools.cache
def convnextv2_large() -> nn.Module:
    with torch.device("meta"):
        return timm.create_model("convnextv2_large", num_classes=1000)


@pytest.fixture(scope="module")
def convnext_shapes() -> dict[str, tuple[int, ...]]:
    """Weight shapes of the 40 convolutions and 72 linear layers of ConvNeXt-V2-L, head excluded."""
    model = convnextv2_large()
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and name != "head.fc"
    }
    assert sum(len(shape) == 4 for shape in shapes.values()) == 40
    assert sum(len(shape) == 2 for shape in shapes.values()) == 72
    return shapes


def convnext(shapes: dict, **settings) -> int:
    model = copy.deepcopy(convnextv2_large())
    return adapter_parameters(model, flora.FloraConfig(target_modules=sorted(shapes), **settings))


def clipped_by_hand(shape: tuple[int, ...], r: int, kernel_rank: int) -> int:
    """Count for one weight, with the clipping worked out case by case."""
    if len(shape) == 2:
        rank = min(r, *shape)
        return rank * (shape[0] + shape[1]) + rank * rank
    out, inside, height, width = shape
    k = min(kernel_rank, height)
    if inside == 1:  # depthwise: no input factor; the core has k x k columns, so no more output directions
        rank = min(r, out, k * k)
        return rank * out + k * (height + width) + rank * k * k
    in_rank = min(r, inside)
    out_rank = min(r, out, in_rank * k * k)  # cuts the stem to 3 x 2 x 2 = 12 output directions
    return out_rank * out + in_rank * inside + k * (height + width) + out_rank * in_rank * k * k


@pytest.mark.parametrize(
    ("r", "count"), [(16, 4529905), (32, 8990449), (64, 18040561), (80, 22630129), (128, 36656881)]
)
def test_convnext_with_useful_ranks(convnext_shapes, r, count):
    assert sum(clipped_by_hand(shape, r, 2) for shape in convnext_shapes.values()) == count
    assert convnext(convnext_shapes, r=r, kernel_rank=2) == count


# Millions, rounded to three digits after the point: grid of ranks and kernel ranks, all layers, input modes per group.
GRID = {
    16: {1: 4.862, 2: 4.893, 3: 4.945, 4: 5.017, 7: 5.357},
    32: {1: 9.781, 2: 9.904, 3: 10.11, 4: 10.397, 7: 11.75},
    64: {1: 19.791, 2: 20.283, 3: 21.103, 4: 22.25, 7: 27.658},
    80: {1: 24.882, 2: 25.65, 3: 26.931, 4: 28.723, 7: 37.173},
    128: {1: 40.499, 2: 42.465, 3: 45.742, 4: 50.331, 7: 71.959},
}


@pytest.mark.parametrize("r", GRID)
def test_convnext_by_the_pure_formula(convnext_shapes, r):
    for kernel_rank, millions in GRID[r].items():
        pure = 0
        for shape in convnext_shapes.values():
            ranks = [r, r] + [kernel_rank] * (len(shape) - 2)
            pure += math.prod(ranks) + sum(rank * size for rank, size in zip(ranks, shape, strict=True))
        assert round(pure / 1e6, 3) == millions
        if kernel_rank == 2:
            assert convnext(convnext_shapes, r=r, kernel_rank=2, clip_ranks="none") == pure


@pytest.mark.parametrize(("r", "count"), [(2, 332064), (4, 664704), (8, 1331712), (16, 2672640)])
def test_deberta_v3_base(r, count):
    sizes = transformers.DebertaV2Config(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        vocab_size=128100,
        relative_attention=True,
        position_buckets=256,
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
    )
    with torch.device("meta"):
        model = transformers.DebertaV2Model(sizes)
    targets = ["query_proj", "key_proj", "value_proj", "attention.output.dense", "intermediate.dense", "output.dense"]
    assert 72 * (r * 768 * 2 + r * r) + 24 * r * (3072 - 768) == count
    assert adapter_parameters(model, flora.FloraConfig(r=r, target_modules=targets)) == count


@pytest.mark.parametrize(("r", "extra"), [(4, 2560), (16, 40960), (32, 163840)])
def test_llama_adds_one_core_per_layer_to_lora(r, extra):
    sizes = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32
    )
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    with torch.device("meta"):
        model, other = transformers.LlamaModel(sizes), transformers.LlamaModel(sizes)
    lora = peft.get_peft_model(other, peft.LoraConfig(r=r, target_modules=targets))
    lora_count = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    assert adapter_parameters(model, flora.FloraConfig(r=r, target_modules=targets)) - lora_count == extra
