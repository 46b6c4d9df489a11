"""Crops and flips of whole batches against torchvision, sample by sample."""

import pytest
import torch
from torchvision.transforms import functional

from flora.tasks.images.augment import Augment, crop_flip


def images(count: int, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)


@pytest.mark.parametrize("reflect", [True, False])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 20)])
def test_every_sample_equals_torchvisions_pad_crop_and_flip(reflect, height, width):
    torch.manual_seed(0)
    batch, padding = images(40, height, width), 3
    top, left = torch.randint(0, 2 * padding + 1, (2, len(batch)))
    flip = torch.rand(len(batch)) < 0.5

    result = crop_flip(batch, top, left, flip, padding, reflect)

    for sample, t, f, is_flipped, augmented in zip(batch, top.tolist(), left.tolist(), flip, result, strict=True):
        padded = functional.pad(sample, [padding] * 4, padding_mode="reflect" if reflect else "constant")
        expected = functional.crop(padded, t, f, height, width)
        assert torch.equal(augmented, functional.hflip(expected) if is_flipped else expected)
    assert result.dtype == torch.uint8


def test_samples_get_places_and_flips_of_their_own():
    torch.manual_seed(0)
    image = images(1)
    result = Augment()(image.expand(400, -1, -1, -1))
    # 16 pixels are padded by 2, so there are 5 x 5 places, flipped or not.
    padded = functional.pad(image[0], [2] * 4, padding_mode="reflect")
    crops = [functional.crop(padded, t, f, 16, 16) for t in range(5) for f in range(5)]
    choices = [*crops, *map(functional.hflip, crops)]
    hits = [sum(torch.equal(image, choice) for image in result) for choice in choices]
    assert sum(hits) == 400
    assert sum(count > 0 for count in hits) == 50
    assert 160 < sum(hits[25:]) < 240


def test_parts_can_be_left_out():
    batch = images(64)
    flipped = Augment(crop=False)(batch)
    unflipped = (flipped == batch).flatten(1).all(1)
    assert torch.equal(flipped[~unflipped], batch[~unflipped].flip(-1))
    assert 0 < int(unflipped.sum()) < 64

    ramp = torch.arange(16, dtype=torch.uint8).expand(64, 3, 16, 16)
    inner = Augment(flip=False)(ramp)[..., 4:12].int()
    assert (inner.diff(dim=-1) == 1).all(), "without flips a rising ramp keeps rising"


def test_the_seed_decides_and_evaluation_changes_nothing():
    batch, augment = images(8), Augment()
    torch.manual_seed(3)
    first = augment(batch)
    torch.manual_seed(3)
    assert torch.equal(augment(batch), first)
    assert not torch.equal(augment(batch), first)
    assert torch.equal(augment.eval()(batch), batch)
