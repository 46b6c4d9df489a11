"""Decoded images in memory: batches, copies, joins and subsets."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from flora.tasks import ImageDataset


def dataset(count: int, start: int = 0) -> ImageDataset:
    """Image and label i are both number start + i."""
    values = torch.arange(start, start + count)
    return ImageDataset(values.to(torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4), values)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_gets_whole_batches_without_collating(workers):
    loader = DataLoader(dataset(10), batch_size=4, collate_fn=lambda batch: batch, num_workers=workers)
    batches = list(loader)
    assert [batch["pixel_values"].shape for batch in batches] == [(4, 3, 4, 4), (4, 3, 4, 4), (2, 3, 4, 4)]
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == list(range(10))
    assert batches[1]["pixel_values"][:, 2, 3, 3].tolist() == [4, 5, 6, 7]
    assert batches[0]["pixel_values"].is_contiguous()


def test_a_batch_is_its_items_stacked():
    data = dataset(10)
    batch = data.__getitems__([7, 2])
    for key, value in batch.items():
        assert torch.equal(value, torch.stack([data[7][key], data[2][key]]))


def test_a_copy_on_a_device_keeps_grey_images_grey():
    grey = dataset(10)
    assert grey.nbytes == 10 * 16 + 10 * 8
    assert grey.to("cpu").nbytes == grey.nbytes
    assert grey.to("meta").images.stride(1) == 0
    colour = ImageDataset(grey.images.contiguous(), grey.labels)
    assert colour.nbytes == 10 * 48 + 10 * 8
    for images in (grey, colour):
        for key, value in images.__getitems__([7, 2]).items():
            assert torch.equal(images.to("cpu").__getitems__([7, 2])[key], value)


def test_concat_puts_one_after_the_other():
    both = dataset(3).concat(dataset(2, start=50))
    assert both.labels.tolist() == [0, 1, 2, 50, 51]
    assert both.images[:, 0, 0, 0].tolist() == [0, 1, 2, 50, 51]


def test_a_subset_is_drawn_not_cut_off():
    data = dataset(100)
    some = data.subset(10)
    assert len(some) == 10
    assert some.labels.tolist() == sorted(set(some.labels.tolist()))
    assert some.labels.max() > 50
    assert torch.equal(some.images[:, 0, 0, 0].long(), some.labels)
    assert data.subset(10).labels.tolist() == some.labels.tolist() != data.subset(10, seed=1).labels.tolist()
    assert len(data.subset(1000)) == 100


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (np.zeros((2, 3, 4, 4), np.float32), np.zeros(2, np.int64)),
        (np.zeros((2, 1, 4, 4), np.uint8), np.zeros(2, np.int64)),
        (np.zeros((2, 3, 4, 4), np.uint8), np.zeros(3, np.int64)),
        (np.zeros((2, 3, 4, 4), np.uint8), np.zeros(2, np.int32)),
    ],
)
def test_wrong_tensors_are_refused(images, labels):
    with pytest.raises(ValueError, match="must be"):
        ImageDataset(torch.from_numpy(images), torch.from_numpy(labels))
