"""Mixup, CutMix and random erasing."""

import numpy as np
import pytest
import torch

from flora.tasks.imagefolder.mix import boxes, erase, mix


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_labels_say_how_much_of_each_image_is_left(mixup, cutmix):
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16)  # image i is i everywhere
    labels = torch.tensor([0, 1, 2, 3])
    shares = []
    for _ in range(50):
        mixed, soft = mix(images, labels, 4, mixup, cutmix)
        expected = soft @ torch.arange(4.0)  # the mean of an image is that of its labels
        assert torch.allclose(mixed.mean((1, 2, 3)), expected, atol=1e-5)
        assert torch.allclose(soft.sum(1), torch.ones(4))
        shares.append(soft[0, 0].item())
        if not mixup:
            assert set(mixed[0].unique().tolist()) <= {0.0, 3.0}, "CutMix blends nothing"
    assert np.std(shares) > 0.1


def test_no_mixing_leaves_images_alone():
    images, labels = torch.randn(3, 3, 8, 8), torch.tensor([1, 0, 1])
    same, soft = mix(images, labels, 2, 0.0, 0.0)
    assert same is images
    assert soft.tolist() == [[0, 1], [1, 0], [0, 1]]


def test_erasing_hides_between_nothing_and_a_third():
    images = torch.full((200, 3, 32, 32), 100.0)
    hidden = (erase(images, 1.0) != 100).float().mean((1, 2, 3))
    assert hidden.max() < 0.36
    assert hidden.mean() > 0.05
    assert (erase(images, 0.0) == 100).all()
    touched = (erase(images, 0.25) != 100).flatten(1).any(1).float().mean()
    assert 0.1 < touched < 0.4


def test_a_box_covers_its_area():
    area, ratio = torch.full((500,), 0.04), torch.ones(500)
    covered = boxes(area, ratio, torch.empty(1, 3, 64, 64)).float().mean((1, 2, 3))
    assert covered.max().item() == pytest.approx(0.04, abs=0.005)
