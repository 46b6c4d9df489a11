"""Layer decay by ConvNeXt-V2's layers, against tables by hand from its optim_factory.py and main_finetune.py."""

import pytest
import timm
import torch
from peft import LoraConfig, get_peft_model

from flora.config import composed
from flora.errors import ConfigError
from flora.models import TimmModel
from flora.models.feature_maps import DenseModel
from flora.results import cells
from flora.training.groups import layer_scales

# A group of base's is three blocks; the number is its place from the stem (0) to the head (13).
GROUPS = {
    "stem.0.weight": 0,
    "stem.1.bias": 0,
    "stages.0.blocks.0.conv_dw.weight": 1,
    "stages.0.blocks.2.mlp.grn.weight": 1,
    "stages.1.downsample.1.weight": 2,
    "stages.1.blocks.2.mlp.fc2.bias": 2,
    "stages.2.downsample.0.weight": 3,
    "stages.2.blocks.0.conv_dw.weight": 3,
    "stages.2.blocks.2.conv_dw.weight": 3,
    "stages.2.blocks.3.conv_dw.weight": 4,
    "stages.2.blocks.14.mlp.fc1.weight": 7,
    "stages.2.blocks.26.norm.weight": 11,
    "stages.3.downsample.1.weight": 12,
    "stages.3.blocks.2.conv_dw.weight": 12,
    "head.norm.weight": 13,
    "head.fc.weight": 13,
}
# Atto has blocks [2, 2, 6, 2]; each is a layer with the downsampling before the first of a stage.
SINGLE = {
    "stem.0.weight": 1,
    "stages.0.blocks.0.conv_dw.weight": 1,
    "stages.0.blocks.1.conv_dw.weight": 2,
    "stages.1.downsample.1.weight": 3,
    "stages.1.blocks.0.conv_dw.weight": 3,
    "stages.2.downsample.1.weight": 5,
    "stages.2.blocks.5.mlp.fc1.weight": 10,
    "stages.3.downsample.0.weight": 11,
    "stages.3.blocks.1.conv_dw.weight": 12,
    "head.norm.bias": 13,
    "head.fc.weight": 13,
}


def on_meta(name):
    with torch.device("meta"):
        return timm.create_model(name, num_classes=10)


@pytest.mark.parametrize("name", ["convnextv2_base", "convnextv2_large"])
def test_base_and_large_have_twelve_groups_and_a_stem(name):
    model = on_meta(name)
    scales = layer_scales(model, 0.6, "group")
    assert set(scales) == {name for name, _ in model.named_parameters()}
    assert {name: scales[name] for name in GROUPS} == pytest.approx({n: 0.6 ** (13 - g) for n, g in GROUPS.items()})
    assert len(set(scales.values())) == 14
    assert min(scales.values()) == pytest.approx(1.306e-3, rel=1e-3), "0.6 to the thirteenth"


class Unheaded(DenseModel):
    heads = ("head",)

    def network(self, features, num_classes):
        model = torch.nn.Module()
        model.backbone, model.head = features, torch.nn.Linear(1, num_classes)
        return model


@pytest.mark.parametrize("name", ["convnextv2_atto", "resnet18"])
def test_a_backbone_under_other_heads_has_the_scales_that_it_has_under_its_own(name):
    scales = layer_scales(Unheaded(TimmModel(name, pretrained=False)).skeleton(), 0.9)
    own = layer_scales(on_meta(name), 0.9)
    kept = {n: scale for n, scale in own.items() if not n.startswith(("head.", "fc."))}
    assert scales == pytest.approx({f"backbone.network.{n}": scale for n, scale in kept.items()})


def test_atto_and_tiny_have_a_layer_for_each_block():
    scales = layer_scales(on_meta("convnextv2_atto"), 0.9)
    assert {name: scales[name] for name in SINGLE} == pytest.approx({n: 0.9 ** (13 - g) for n, g in SINGLE.items()})
    assert layer_scales(on_meta("convnextv2_atto"), 0.9, "single") == scales
    tiny = layer_scales(on_meta("convnextv2_tiny"), 0.9)
    assert min(tiny.values()) == pytest.approx(0.9**18), "18 blocks"


def test_networks_without_groups_are_refused():
    with pytest.raises(ConfigError, match=r"trainer\.layer_decay_type=group is for ConvNeXts that are trained in full"):
        layer_scales(on_meta("resnet18"), 0.6, "group")
    wrapped = get_peft_model(timm.create_model("test_convnext"), LoraConfig(target_modules=["fc1"], r=1))
    for kind in ("group", "single"):
        with pytest.raises(ConfigError, match="trained in full"):
            layer_scales(wrapped, 0.6, kind)


def test_imagenet_is_trained_by_convnextv2s_recipe_from_weights_that_saw_no_label():
    """TRAINING.md of facebookresearch/ConvNeXt-V2 @d7cc26f, base."""
    table = cells.load("classification", "paper")
    for cell in table.cells:
        cfg = composed(cell.overrides)
        assert cfg.model.timm_name == "convnextv2_base.fcmae"
        trainer = cfg.trainer
        assert (trainer.batch_size, trainer.epochs, trainer.warmup_ratio) == (1024, 100, 20 / 100)
        assert (trainer.weight_decay, trainer.drop_path, trainer.label_smoothing) == (0.05, 0.1, 0.1)
        assert (cfg.task.random_erasing, cfg.task.mixup, cfg.task.cutmix) == (0.25, 0.8, 1.0)
        assert (cfg.task.auto_augment, cfg.task.classes) == ("rand-m9-mstd0.5-inc1", 1000)
        assert (trainer.ema_decay, trainer.max_grad_norm, trainer.dtype) == (0.9999, 0, "bf16")
        full = cell.method == "full"
        if full:
            assert trainer.lr == 6.25e-4 * 1024 / 256
        decay = (0.6, "group") if full else (0, None)
        assert (trainer.layer_decay, trainer.layer_decay_type) == decay
    assert {cell.method for cell in table.cells} == {"linear_probe", "bitfit", "lora", "dora", "flora", "full"}
