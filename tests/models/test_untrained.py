"""What weights do not hold: the last norm of FCMAE's ConvNeXts, and all of a network without weights."""

import huggingface_hub
import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import save_file

from flora.config import instantiate
from flora.files import ROOT
from flora.methods.heads import trained
from flora.methods.peft import Peft
from flora.models import TimmModel
from flora.models.vision import _say_random


@pytest.fixture
def fcmae(tmp_path, monkeypatch):
    """The encoder that FCMAE trains, in the hub's cache: neither the last norm nor a classifier."""
    stored = timm.create_model("convnextv2_atto").state_dict()
    encoder = {name: tensor for name, tensor in stored.items() if not name.startswith("head.")}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--timm--convnextv2_atto.fcmae"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    save_file(encoder, snapshot / "model.safetensors")
    return encoder, snapshot / "model.safetensors"


@pytest.mark.parametrize("place", ["hub", "path"])
def test_fcmaes_weights_load_and_the_norm_that_they_lack_is_of_the_head(fcmae, place):
    encoder, path = fcmae
    spec = TimmModel("convnextv2_atto.fcmae", weights=str(path) if place == "path" else None)
    assert (spec.classifier, spec.image_size, spec.interpolation) == (["head.norm", "head.fc"], 224, "bicubic")
    model = spec.build(7)
    own = model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in encoder.items())
    assert own.keys() - encoder.keys() == {
        f"head.{part}.{kind}" for part in ("norm", "fc") for kind in ("weight", "bias")
    }
    adapted = Peft("lora", "peft.LoraConfig", r=1, target_modules=["fc1"]).apply(model, spec.classifier)
    assert trained(adapted.model, spec.classifier)[1] == 2 * 320 + 7 * 320 + 7


def test_imagenets_config_names_weights_without_imagenets_labels():
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", ["experiment=imagenet_convnextv2_base"])
        untuned = instantiate(cfg.model)
        tuned = instantiate(compose("train", ["model=convnextv2_base"]).model)
    assert timm.get_pretrained_cfg(untuned.timm_name).hf_hub_id == "timm/convnextv2_base.fcmae"
    assert timm.get_pretrained_cfg(tuned.timm_name).tag == "fcmae_ft_in22k_in1k", "what the other saw"


def test_a_network_without_weights_says_once_that_it_is_random(capsys):
    _say_random.cache_clear()
    spec = TimmModel("test_resnet", pretrained=False, image_size=32)
    spec.build(2)
    spec.build(2)
    assert capsys.readouterr().err == "model test_resnet: random weights, nothing in it is pretrained\n"
