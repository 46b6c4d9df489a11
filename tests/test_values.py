"""Numbers as people type them: every setting of configs/ that means a float takes an integer."""

from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import get_object
from omegaconf import OmegaConf

from flora.config import composed, instantiate, instantiate_method
from flora.errors import ConfigError
from flora.models import TransformersModel
from flora.tasks.imagefolder.mix import mix
from flora.values import _annotations

NODES = {
    str(path.relative_to("configs")): node
    for path in sorted(Path("configs").rglob("*.yaml"))
    if "_target_" in (node := yaml.safe_load(path.read_text()) or {})
}
RATES = {"lr", "head_lr"}  # of configs/adapter; the trainer's


def takers(node):
    """What reads a node's settings: its target, and the class of PEFT that it hands the rest to."""
    named = [node["_target_"], *([node["config_class"]] if "config_class" in node else [])]
    return [get_object(name) for name in named] + ([get_object("peft.AdaLoraConfig")] if "AdaLora" in named[0] else [])


@pytest.mark.parametrize("name", NODES)
def test_every_float_of_a_config_is_one_for_its_taker(name):
    floats = {key for key, value in NODES[name].items() if isinstance(value, float)} - RATES
    kinds = {}
    for taker in reversed(takers(NODES[name])):
        kinds |= _annotations(taker)
    assert {key for key in floats if float not in kinds[key]} == set()


@pytest.mark.parametrize("name", [name for name in NODES if NODES[name]["_target_"].startswith("flora.tasks.")])
def test_every_float_of_a_task_takes_an_integer(name):
    taker = get_object(NODES[name]["_target_"])
    floats = [key for key, kinds in _annotations(taker).items() if float in kinds and key in NODES[name]]
    assert "epochs" in floats
    for key in floats:
        cfg = composed([f"task={Path(name).stem}", f"task.{key}=1"])
        try:
            built = instantiate(cfg.task)
        except ConfigError:
            continue  # 1 is out of its range
        assert type(getattr(built, key)) is float


def test_cutmix_and_mixup_take_an_integer():
    cfg = OmegaConf.create({"task": {"_target_": "flora.tasks.ImageFolder", "cutmix": 1, "mixup": 2}})
    cfg.task.update({"name": "imagefolder", "dataset": ".", "epochs": 1})
    built = instantiate(cfg.task)
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    _, shares = mix(images, labels, 2, built.mixup, built.cutmix)
    assert shares.sum(1).tolist() == pytest.approx([1, 1, 1, 1])


def test_a_method_and_an_architecture_take_integers_for_floats():
    method = instantiate_method(composed(["adapter=lora", "adapter.lora_dropout=0"]).adapter)
    assert type(method.options["lora_dropout"]) is float
    sizes = {"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2, "layer_norm_eps": 1}
    assert TransformersModel("tiny", "sequence_classification", sizes, pretrained=False).config().layer_norm_eps == 1.0
    parts = {"model_type": "llava", "text_config": {"model_type": "llama", "rms_norm_eps": 1}}
    built = TransformersModel("tiny", "image_text", parts, pretrained=False)
    assert built.config().text_config.rms_norm_eps == 1.0


def test_lists_of_floats_take_integers_and_whole_floats_are_integers():
    cfg = composed(["protocol.lr_grid=[1,2e-3]", "trainer.max_steps=1e3", "trainer.batch_size=6.4e1"])
    assert [type(lr) for lr in instantiate(cfg.protocol).lr_grid] == [float, float]
    settings = instantiate(cfg.trainer)
    assert (settings.max_steps, settings.batch_size) == (1000, 64)
    assert type(settings.max_steps) is int


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.lr=fast", r"trainer\.lr must be a number, got 'fast'"),
        ("trainer.lr=true", r"trainer\.lr must be a number, got True"),
        ("trainer.batch_size=1.5", r"trainer\.batch_size must be a whole number, got 1\.5"),
        ("trainer.compile=1", r"trainer\.compile must be true or false, got 1"),
        ("protocol.lr_grid=[1e-3,high]", r"protocol\.lr_grid\.1 must be a number, got 'high'"),
        ("trainer.weight_decay=[1]", r"trainer\.weight_decay must be a number, got \[1\]"),
        (f"trainer.weight_decay=1{'0' * 400}", r"trainer\.weight_decay must be a number, got 10000"),
    ],
)
def test_what_is_no_number_is_said_by_its_whole_name(override, said):
    cfg = composed([override])
    with pytest.raises(ConfigError, match=said):
        instantiate(cfg[override.split(".")[0]])


def test_shares_that_may_be_off_take_no_switch():
    with pytest.raises(ConfigError, match=r"^cutmix must be a number, got True"):
        instantiate(OmegaConf.create({"_target_": "flora.tasks.ImageFolder", "dataset": ".", "cutmix": True}))
