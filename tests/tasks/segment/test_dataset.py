"""Scenes as batches hold them: what masks mean, what is refused, one crop for image and mask."""

import numpy as np
import pytest
import torch
from PIL import Image

from flora.errors import ConfigError, DataError
from flora.tasks.segment.crops import distorted, random_crop
from flora.tasks.segment.datasets import DATASETS, IGNORED
from tests.tasks.segment.made import encoded, network, scene, task, write_ade20k, write_camvid, write_table


def splits(data, **options):
    return task(**options).load_for(network(), data)


def with_train(data, image, mask):
    write_camvid(data)
    write_table(data / "camvid", "test", [(image, mask)] * 2)
    return data


def test_camvid_is_read_as_its_tables_have_it(tmp_path):
    write_camvid(tmp_path)
    loaded = splits(tmp_path)
    assert [len(split) for split in (loaded.train, loaded.validation, loaded.test)] == [6, 2, 3]
    assert loaded.class_names[::10] == ["sky", "bicyclist"]
    batch = loaded.test.__getitems__([0, 2])
    for row, number in enumerate((8, 10)):
        image, mask = scene(number)
        assert np.array_equal(batch["pixel_values"][row].permute(1, 2, 0), image)
        assert np.array_equal(batch["labels"][row], np.where(mask == 255, IGNORED, mask.astype(int)))
    assert batch["sizes"].tolist() == [[48, 64, 48, 64]] * 2


def test_ade20ks_folder_holds_validation_out_and_counts_classes_from_one(tmp_path):
    place = write_ade20k(tmp_path)
    loaded = splits(tmp_path, dataset="ade20k", held_out=0.2)
    assert loaded.facts["counts"] == {"train": 8, "validation": 2, "test": 2}
    assert (loaded.num_classes, loaded.class_names[0], loaded.class_names[-1]) == (150, "wall", "flag")
    assert {*loaded.train.rows} | {*loaded.validation.rows} == {*range(10)}
    labels = loaded.test.__getitems__([1])["labels"][0].numpy()
    assert np.array_equal(labels[1:], scene(1)[1][1:])
    assert (labels[0] == IGNORED).all()
    before = task(dataset="ade20k").contents(tmp_path)
    Image.fromarray(scene(5)[1]).save(place / "annotations" / "training" / "ADE_0.png")
    assert task(dataset="ade20k").contents(tmp_path) != before, "masks decide a run too"
    (place / "annotations" / "training" / "ADE_3.png").unlink()
    with pytest.raises(DataError, match=r"ADE_3\.jpg has no mask .*ADE_3\.png: unpack the data set again"):
        splits(tmp_path, dataset="ade20k")


def test_there_are_150_classes_of_ade20k():
    assert len({*DATASETS["ade20k"].classes}) == 150


IMAGE, MASK = scene(0)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (encoded(MASK[:, :60]), "row 0: its mask is 60 x 48, the image 64 x 48 pixels: pair each image with its own"),
        (encoded(MASK + 5), "row 0: its mask is of another data set: it has class 11, beside 0 to 10 and 255 for none"),
        (encoded(IMAGE), "row 0: its mask has pixels of mode RGB: save the classes as one number each"),
        (encoded(MASK)[:60], "row 0: mask cannot be decoded .*; mend it or set task.unreadable=skip"),
        (None, "row 0: mask cannot be decoded .neither bytes nor path.; mend it or set task.unreadable=skip"),
    ],
)
def test_a_mask_that_cannot_be_right_is_said_in_one_line(tmp_path, mask, said):
    loaded = splits(with_train(tmp_path, encoded(IMAGE), mask))
    with pytest.raises(DataError, match=said) as refused:
        loaded.test.__getitems__([0])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("part", [0, 1])
def test_what_cannot_be_decoded_is_skipped_and_counted(tmp_path, part):
    write_camvid(tmp_path)
    cells = [[encoded(pixels) for pixels in scene(number)] for number in range(3)]
    cells[1][part] = cells[1][part][:70]
    write_table(tmp_path / "camvid", "test", cells)
    loaded = splits(tmp_path, unreadable="skip")
    assert len(loaded.test.__getitems__([0, 1, 2])["labels"]) == 2
    assert [name.rpartition("/")[2] for name in loaded.test.catalogue.skipped()] == ["test.parquet, row 1"]
    alone = loaded.test.__getitems__([1])
    assert (alone["rows"].tolist(), alone["counts"].item()) == ([10], False), "the next stands in, and does not count"


def test_tables_without_masks_are_refused(tmp_path):
    write_camvid(tmp_path)
    path = tmp_path / "camvid" / "train.parquet"
    path.write_bytes(b"no table")
    with pytest.raises(DataError, match="not a readable parquet file"):
        splits(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"has neither train\*\.parquet nor images/training/\*\.jpg"):
        splits(tmp_path)
    with pytest.raises(DataError, match="there is no folder"):
        splits(tmp_path / "elsewhere")


def test_image_and_mask_are_cropped_scaled_and_flipped_together(tmp_path):
    write_camvid(tmp_path, height=80, width=176)
    train = splits(tmp_path, scales=[0.5, 2.0]).train
    flips = 0
    for epoch in range(4):
        train.begin_epoch(7, epoch)
        batch = train.__getitems__(range(6))
        for image, labels in zip(batch["pixel_values"], batch["labels"], strict=True):
            inside = labels >= 0
            difference = (image[0].float() - 20 * labels.float()).abs()
            assert (difference[inside] <= 5).float().mean() > 0.6, "grey tells the class, but where stripes meet"
            flips += int((labels[20].float().diff().clamp(-2, 2).sum()) < 0)
    assert 4 < flips < 20


def test_a_crop_depends_on_the_seed_the_epoch_and_the_image_alone(tmp_path):
    write_camvid(tmp_path)

    def crops(seed, epoch, rows):
        train = splits(tmp_path).train
        train.begin_epoch(seed, epoch)
        return train.__getitems__(rows)["pixel_values"]

    once = crops(3, 1, range(6))
    assert torch.equal(crops(3, 1, [5, 4, 3, 2, 1, 0]), once.flip(0))
    assert not torch.equal(crops(3, 2, range(6)), once)
    assert not torch.equal(crops(4, 1, range(6)), once)


def test_what_an_image_does_not_fill_does_not_count():
    image, mask = scene(0)
    pixels, labels = random_crop(
        Image.fromarray(image),
        mask.astype(np.int16),
        np.random.RandomState(0),
        **{"size": 48, "crop": 96, "scales": (1.0, 1.0), "flip": False, "interpolation": "bilinear", "fill": (1, 2, 3)},
    )
    assert np.array_equal(pixels[:48, :64], image)
    assert np.array_equal(labels[:48, :64], mask)
    assert (labels[48:] == IGNORED).all()
    assert (labels[:, 64:] == IGNORED).all()
    assert pixels[90, 90].tolist() == [1, 2, 3]


def test_colours_change_in_training_alone_and_as_the_image_is_drawn(tmp_path):
    write_camvid(tmp_path)
    plain, other = splits(tmp_path), splits(tmp_path, photometric=True)
    before, after = (loaded.train.__getitems__(range(6)) for loaded in (plain, other))
    assert torch.equal(before["labels"], after["labels"])
    changed = (before["pixel_values"] != after["pixel_values"]).flatten(1).any(1)
    assert 3 <= changed.sum() <= 6
    assert torch.equal(other.train.__getitems__([5, 2])["pixel_values"], after["pixel_values"][[5, 2]])
    for part in ("validation", "test"):
        both = [getattr(loaded, part).__getitems__([0])["pixel_values"] for loaded in (plain, other)]
        assert torch.equal(*both)


def test_colours_change_as_mmsegmentation_says():
    """Grey stays grey, and is lighter or darker by at most a quarter; each change comes in half of the images."""
    grey = np.full((4, 4, 3), 80, np.uint8)
    colour = np.broadcast_to(np.array([200, 60, 60], np.uint8), (4, 4, 3))
    greys = [distorted(grey, np.random.RandomState(seed)) for seed in range(400)]
    assert all((image == image[0, 0, 0]).all() for image in greys)
    values = np.array([image[0, 0, 0] for image in greys], float)
    assert 80 * 0.75 - 1 <= values.min() < 64 < 96 < values.max() <= 80 * 1.25 + 1, "contrast is about the mean"
    assert 0.4 < (abs(values - 80) <= 1).mean() < 0.65, "a half, but for roundings and small changes"
    same = np.mean([(distorted(colour, np.random.RandomState(seed)) == colour).all() for seed in range(400)])
    assert 0.02 < same < 0.12, "a sixteenth"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"photometric": "yes"}, "task.photometric=yes must be true or false"),
        ({"dataset": "camvide"}, "did you mean camvid"),
        ({"crop": 16}, "task.crop=16 must be a whole number of at least 32 pixels"),
        ({"scales": [2.0, 0.5]}, "two factors between 0.05 and 20, the least first"),
        ({"held_out": 1.0}, "task.held_out=1.0 must lie between 0 and 1"),
        ({"unreadable": "no"}, "task.unreadable=no must be error or skip"),
    ],
)
def test_settings_out_of_range_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        task(**options)


@pytest.mark.data
def test_camvids_own_tables_have_the_published_split_and_known_classes(data_folder):
    loaded = task(size=None, crop=None).load_for(network(), data_folder)
    assert loaded.facts["counts"] == {"train": 367, "validation": 101, "test": 233}
    batch = loaded.test.__getitems__(range(0, 233, 29))
    assert batch["pixel_values"].shape == (9, 3, 360, 480)
    assert set(batch["labels"].unique().tolist()) == {IGNORED, *range(11)}
