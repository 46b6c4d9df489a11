"""scripts/pretrain.py: augmentation against torchvision and by hand, averaged batch norms, resumed runs, the file."""

import importlib.util
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torchvision.transforms.v2 import functional as tv

from flora.models.weights import BUNDLED
from flora.tasks.images import mixing

SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrain.py"
spec = importlib.util.spec_from_file_location("pretrain", SCRIPT)
pretrain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pretrain)


@pytest.fixture
def options(monkeypatch):
    def parse(*arguments):
        monkeypatch.setattr("sys.argv", ["pretrain.py", *arguments])
        return pretrain.parse_args()

    return parse


def test_recolouring_is_saturation_contrast_brightness_then_normalisation(monkeypatch):
    factors = iter([1.1, 0.8, 1.3])  # brightness, contrast, saturation, in the order they are drawn
    monkeypatch.setattr(mixing, "uniform", lambda n, low, high, device: torch.full((n,), next(factors)))
    x = torch.rand(3, 3, 64, 64) * 0.4 + 0.3  # so that nothing is clipped
    expected = tv.adjust_brightness(tv.adjust_contrast(tv.adjust_saturation(x, 1.3), 0.8), 1.1)
    expected = tv.normalize(expected, mixing.MEAN, mixing.STD)
    torch.testing.assert_close(mixing.recolor(x, 0.4), expected, rtol=0, atol=2e-3)


def test_a_full_crop_without_rotation_is_the_image_or_its_mirror(monkeypatch):
    monkeypatch.setattr(mixing, "uniform", lambda n, low, high, device: torch.full((n,), min(high, max(low, 1.0))))
    monkeypatch.setattr(torch, "exp", lambda x: torch.ones_like(x))  # no change of aspect ratio
    x = torch.rand(16, 3, 64, 64)
    warped = mixing.warp(x, smallest=1.0, degrees=0.0)
    mirrored = [torch.allclose(a, b.flip(-1), atol=1e-4) for a, b in zip(warped, x, strict=True)]
    same = [torch.allclose(a, b, atol=1e-4) for a, b in zip(warped, x, strict=True)]
    assert all(m != s for m, s in zip(mirrored, same, strict=True))
    assert any(mirrored)
    assert any(same)


def test_each_label_counts_by_its_share_of_the_pixels(options):
    args = options("--color", "0", "--erase", "0", "--mixup-prob", "0.4", "--cutmix-prob", "0.4")
    levels = torch.linspace(0, 255, 64).to(torch.uint8)
    images = levels.view(-1, 1, 1, 1).expand(-1, 3, 64, 64)  # flat images: a crop changes nothing
    mixed, share = mixing.augment(images, args, tail=False)
    grey = tv.normalize(images.float() / 255, mixing.MEAN, mixing.STD).mean((1, 2, 3))
    expected = share * grey + (1 - share) * grey.roll(1)
    torch.testing.assert_close(mixed.mean((1, 2, 3)), expected, rtol=0, atol=1e-4)
    assert {(share == 1).any().item(), (share < 1).any().item()} == {True}


def test_the_tail_mixes_nothing(options):
    images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(mixing.augment(images, options(), tail=True)[1], torch.ones(8))


@pytest.fixture
def tiny(monkeypatch):
    """A tenth of each architecture, under its name."""
    convnext, resnet = pretrain.Architecture("test_convnext"), pretrain.ARCHITECTURES["resnet18_narrow"]
    monkeypatch.setitem(pretrain.ARCHITECTURES, "convnextv2_atto", convnext)
    small = pretrain.Architecture("resnet18", {"channels": (8, 8, 8, 8)}, resnet.recipe)
    monkeypatch.setitem(pretrain.ARCHITECTURES, "resnet18_narrow", small)


BRIEF = ("--warmup", "1", "--batch", "4", "--device", "cpu")


@pytest.mark.parametrize("architecture", pretrain.ARCHITECTURES)
def test_a_resumed_run_is_the_same_run(options, tmp_path, tiny, architecture):
    args = options("--architecture", architecture, "--epochs", "3", *BRIEF)
    images, labels = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8), torch.arange(8)
    run = pretrain.Run(args, steps=2)
    run.epoch(images, labels, tail=False)
    run.save(tmp_path / "checkpoint.pt", 1, 5.0)
    expected = run.epoch(images, labels, tail=False)
    resumed = pretrain.Run(args, steps=2)
    assert resumed.restore(tmp_path / "checkpoint.pt") == (1, 5.0)
    assert resumed.epoch(images, labels, tail=False) == expected
    for name, tensor in run.average.state_dict().items():
        assert torch.equal(tensor, resumed.average.state_dict()[name]), name


@pytest.mark.parametrize("architecture", pretrain.ARCHITECTURES)
def test_the_defaults_are_the_recipe_of_the_weights_that_ship(options, architecture):
    recorded = json.loads((BUNDLED / f"{architecture}_tiny_imagenet.json").read_text())["recipe"]
    speed = {"compile", "channels_last"}
    defaults = vars(options("--architecture", architecture))
    assert {key: defaults[key] for key in recorded.keys() - speed} == {k: recorded[k] for k in recorded.keys() - speed}


def test_an_option_goes_before_the_architectures_recipe(options):
    args = options("--epochs", "7", "--architecture=resnet18_narrow", "--drop-path", "0.1")
    assert (args.epochs, args.drop_path, args.lr) == (7, 0.1, 2e-3)


def test_the_averages_batch_norms_hold_the_statistics_of_its_own_activations(options, tiny, monkeypatch):
    monkeypatch.setattr(pretrain, "augment", lambda images, args, tail: (images.float() / 255, torch.ones(4)))
    run = pretrain.Run(options("--architecture", "resnet18_narrow", "--epochs", "3", "--lr", "0.1", *BRIEF), steps=3)
    images = torch.randint(0, 256, (12, 3, 64, 64), dtype=torch.uint8)
    run.epoch(images, torch.arange(12), tail=False)
    before = {name: buffer.clone() for name, buffer in run.average.named_buffers()}
    assert torch.equal(before["bn1.running_mean"], torch.zeros(64))  # no step touches them
    torch.manual_seed(1)
    batches = torch.randperm(12).split(4)
    torch.manual_seed(1)
    run.recalibrate(images)
    assert not run.average.training
    with torch.autocast("cpu", torch.bfloat16):
        first = [run.average.conv1(images[index].float() / 255).double() for index in batches]
    mean = torch.stack([x.mean((0, 2, 3)) for x in first]).mean(0)
    variance = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in first]).mean(0)
    torch.testing.assert_close(run.average.bn1.running_mean.double(), mean, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(run.average.bn1.running_var.double(), variance, rtol=1e-2, atol=1e-3)
    for name, buffer in run.average.named_buffers():
        assert not torch.equal(buffer, before[name]), name


def test_the_file_has_parameters_in_fp16_and_is_judged_as_it_will_be_loaded(options, tmp_path, tiny):
    args = options("--architecture", "resnet18_narrow", "--epochs", "1", "--out", str(tmp_path), *BRIEF)
    images, labels = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8), torch.arange(8)
    run = pretrain.Run(args, steps=2)
    run.epoch(images, labels, tail=False)
    run.recalibrate(images)
    run.net.bn1.running_var[0] = run.average.bn1.running_var[0] = 1e6  # more than fp16 holds
    pretrain.ship(args, run, (images, labels), seconds=1.0)
    stored = load_file(tmp_path / "resnet18_narrow_tiny_imagenet.safetensors")
    dtypes = {name.rsplit(".")[-1]: tensor.dtype for name, tensor in stored.items()}
    buffers = {"running_mean": torch.float32, "running_var": torch.float32, "num_batches_tracked": torch.int64}
    assert dtypes == {"weight": torch.float16, "bias": torch.float16, **buffers}
    assert stored["bn1.running_var"][0] == 1e6
    record = json.loads((tmp_path / "resnet18_narrow_tiny_imagenet.json").read_text())
    assert (record["architecture"], record["channels"]) == ("resnet18", [8, 8, 8, 8])
    net = timm.create_model("resnet18", channels=(8, 8, 8, 8), num_classes=200).eval()
    net.load_state_dict(stored)
    with torch.no_grad():
        hits = net(tv.normalize(images.float() / 255, mixing.MEAN, mixing.STD)).topk(5).indices == labels[:, None]
    assert record["validation"]["top5"] == hits.double().sum().item() / 8


def test_a_folder_without_data_is_one_line(script, tmp_path):
    code, _, said = script(pretrain.main, SCRIPT, "--data", tmp_path / "none", "--out", tmp_path / "out")
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith(f"error: --data {tmp_path / 'none'}: ")
    assert not (tmp_path / "out").exists()
