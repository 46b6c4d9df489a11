"""Evaluation by sliding windows, beside a plain loop in numpy."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flora.errors import ConfigError
from flora.tasks.segment.windows import check_windows, slid, starts
from tests.tasks.segment.made import network, task


@pytest.mark.parametrize(
    ("side", "window", "stride", "expected"),
    [(10, 4, 3, [0, 3, 6]), (11, 4, 3, [0, 3, 6, 7]), (4, 4, 3, [0]), (3, 4, 3, [0]), (9, 4, 4, [0, 4, 5])],
)
def test_windows_reach_from_edge_to_edge(side, window, stride, expected):
    assert starts(side, window, stride) == expected


def test_each_pixel_has_the_mean_of_the_windows_that_see_it():
    torch.manual_seed(0)
    module = nn.Conv2d(3, 5, 7, padding=3).eval()  # what it says of a pixel depends on where the window ends
    images = torch.randn(2, 3, 21, 30)
    got = slid(module, images, window=12, stride=8)
    total, count = np.zeros((2, 5, 21, 30)), np.zeros((21, 30))
    for top in (0, 8, 9):
        for left in (0, 8, 16, 18):
            with torch.no_grad():
                part = module(images[:, :, top : top + 12, left : left + 12]).numpy()
            total[:, :, top : top + 12, left : left + 12] += part
            count[top : top + 12, left : left + 12] += 1
    np.testing.assert_allclose(got.detach().numpy(), total / count, atol=1e-5)


def test_a_window_as_large_as_the_image_sees_it_whole():
    module = nn.Conv2d(3, 2, 4, stride=4)
    images = torch.randn(1, 3, 24, 32)
    whole = F.interpolate(module(images), size=(24, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(slid(module, images, window=64, stride=40), whole)


def test_an_evaluation_slides():
    spec = network()
    module = spec.build(11).eval()
    images = torch.randint(0, 256, (1, 3, 48, 64), dtype=torch.uint8)
    batch = {"pixel_values": images, "labels": torch.zeros(1, 48, 64), "sizes": torch.tensor([[48, 64, 48, 64]])}
    batch["rows"] = torch.tensor([0])
    with torch.no_grad():
        logits, _ = task(window=32, stride=16).forward(spec)(module, batch, False)
        whole, _ = task().forward(spec)(module, batch, False)
        expected = slid(module, spec.normalize(images), 32, 16)
    torch.testing.assert_close(logits, expected)
    assert not torch.allclose(logits, whole)


@pytest.mark.parametrize(
    ("window", "stride", "message"),
    [
        (None, 16, "set task.window"),
        (16, None, "at least 32"),
        (64, 65, "between 1 and task.window=64"),
        (64, 0, "between 1"),
    ],
)
def test_windows_that_leave_pixels_out_are_refused(window, stride, message):
    with pytest.raises(ConfigError, match=message):
        check_windows(window, stride, 32)
