"""scripts/pretrain.py: its augmentation against torchvision and by hand, and that a resumed run is the same run."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

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
    monkeypatch.setattr(pretrain, "uniform", lambda n, low, high, device: torch.full((n,), next(factors)))
    x = torch.rand(3, 3, 64, 64) * 0.4 + 0.3  # so that nothing is clipped
    expected = tv.adjust_brightness(tv.adjust_contrast(tv.adjust_saturation(x, 1.3), 0.8), 1.1)
    expected = tv.normalize(expected, pretrain.MEAN, pretrain.STD)
    torch.testing.assert_close(pretrain.recolor(x, 0.4), expected, rtol=0, atol=2e-3)


def test_a_full_crop_without_rotation_is_the_image_or_its_mirror(monkeypatch):
    monkeypatch.setattr(pretrain, "uniform", lambda n, low, high, device: torch.full((n,), min(high, max(low, 1.0))))
    monkeypatch.setattr(torch, "exp", lambda x: torch.ones_like(x))  # no change of aspect ratio
    x = torch.rand(16, 3, 64, 64)
    warped = pretrain.warp(x, smallest=1.0, degrees=0.0)
    mirrored = [torch.allclose(a, b.flip(-1), atol=1e-4) for a, b in zip(warped, x, strict=True)]
    same = [torch.allclose(a, b, atol=1e-4) for a, b in zip(warped, x, strict=True)]
    assert all(m != s for m, s in zip(mirrored, same, strict=True))
    assert any(mirrored)
    assert any(same)


def test_each_label_counts_by_its_share_of_the_pixels(options):
    args = options("--color", "0", "--erase", "0", "--mixup-prob", "0.4", "--cutmix-prob", "0.4")
    levels = torch.linspace(0, 255, 64).to(torch.uint8)
    images = levels.view(-1, 1, 1, 1).expand(-1, 3, 64, 64)  # flat images: a crop changes nothing
    mixed, share = pretrain.augment(images, args, tail=False)
    grey = tv.normalize(images.float() / 255, pretrain.MEAN, pretrain.STD).mean((1, 2, 3))
    expected = share * grey + (1 - share) * grey.roll(1)
    torch.testing.assert_close(mixed.mean((1, 2, 3)), expected, rtol=0, atol=1e-4)
    assert {(share == 1).any().item(), (share < 1).any().item()} == {True}


def test_the_tail_mixes_nothing(options):
    images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(pretrain.augment(images, options(), tail=True)[1], torch.ones(8))


def test_a_resumed_run_is_the_same_run(options, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "ARCHITECTURE", "test_convnext")  # a tenth of the size
    args = options("--epochs", "3", "--warmup", "1", "--batch", "4", "--device", "cpu")
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


def test_a_folder_without_data_is_one_line(script, tmp_path):
    code, _, said = script(pretrain.main, SCRIPT, "--data", tmp_path / "none", "--out", tmp_path / "out")
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith(f"error: --data {tmp_path / 'none'}: ")
    assert not (tmp_path / "out").exists()
