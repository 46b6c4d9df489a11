"""Tiles: where they lie, which objects they have, and what batches of them hold."""

import numpy as np
import pytest
import shapely
import torch

from flora.tasks.detect.objects import Annotated, Part
from flora.tasks.oriented.dataset import Images, Tiles, with_objects
from flora.tasks.oriented.objects import Oriented, places, tiled
from flora.tasks.oriented.task import turned
from tests.tasks.oriented.made import SIDE, annotated_of, drawn


@pytest.mark.parametrize(
    ("size", "starts"),
    [(2000, [0, 824, 976]), (1024, [0]), (1848, [0, 824]), (1849, [0, 824, 825]), (300, [0])],
)
def test_tiles_end_where_the_image_ends(size, starts):
    found = places(size, 1024, 1024, 200)

    assert found[:, 0].tolist() == starts
    assert found[:, 2].tolist() == [min(size, 1024)] * len(starts)
    assert (found[:, [1, 3]] == [0, 1024]).all()


@pytest.mark.parametrize("seed", range(3))
def test_a_tile_has_the_objects_that_show_enough_of_themselves(seed):
    annotated = drawn(seed)

    whole = tiled(annotated, 64, 16, 0.7)

    objects, cut = annotated.objects, 0
    assert len(whole.image) == len(annotated) * 9
    for tile, (image, (top, left, height, width)) in enumerate(zip(whole.image, whole.places, strict=True)):
        frame = shapely.box(left, top, left + width, top + height)
        expected = []
        for i in range(*objects.of(image).indices(len(objects.classes))):
            polygon = shapely.Polygon(objects.corners[i])
            share = polygon.intersection(frame).area / polygon.area
            expected += [i] * (share >= 0.7)
            cut += 0.7 <= share < 0.999
        corners, classes = whole.learnt(tile)
        assert sorted(whole.members[whole.starts[tile] : whole.starts[tile + 1]].tolist()) == expected
        np.testing.assert_array_equal(corners + np.array([left, top]), objects.corners[expected])
        np.testing.assert_array_equal(classes, objects.classes[expected])
    assert cut > 5


def test_every_object_that_fits_is_whole_in_a_tile():
    """Where tiles share more than an object is long."""
    whole = tiled(drawn(3), 80, 45, 1.0)

    objects = whole.annotated.objects
    inside = ((objects.corners >= 0) & (objects.corners <= SIDE)).all((1, 2))
    assert set(np.flatnonzero(inside)) <= set(whole.members.tolist())


def test_an_object_without_area_is_in_no_tile():
    flat = np.array([[[5.0, 5], [9, 9], [9, 9], [5, 5]]])
    objects = Oriented(flat, np.zeros(1, np.int64), np.zeros(1, bool), np.array([0, 1]))

    assert len(tiled(annotated_of(objects, np.array([[20, 20]]), ["a"]), 32, 0, 0.7).members) == 0


def pictures(sizes=((50, 70), (30, 20))):
    """Two images of noise; the first has an object at its right end, the second none."""
    from PIL import Image

    rng = np.random.default_rng(0)
    made = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    corner = np.array([[[60.0, 40], [68, 40], [68, 48], [60, 48]]])
    objects = Oriented(corner, np.array([1]), np.zeros(1, bool), np.array([0, 1, 1]))
    openers = [lambda image=image: Image.fromarray(image) for image in made]
    part = Part(openers, ["a.png", "b.png"], np.array(sizes), objects)
    return made, tiled(Annotated.of([part], ["x", "y"]), 40, 8, 0.7)


def test_a_batch_to_evaluate_holds_whole_images_and_their_tiles():
    made, whole = pictures()

    batch = Images(whole, np.arange(2), skip=False, once=True).__getitems__([1, 0])

    assert batch["labels"].tolist() == [1, 0]
    assert batch["pixel_values"].shape == (2, 3, 50, 70)
    assert batch["tiles"].tolist() == [
        [0, 0, 0, 30, 20],
        *([1, top, left, 40, 40] for top in (0, 10) for left in (0, 30)),
    ]
    for place, image in ((0, made[1]), (1, made[0])):
        height, width = image.shape[:2]
        assert (batch["pixel_values"][place, :, :height, :width].permute(1, 2, 0).numpy() == image).all()
    assert batch["found"].tolist() == [0, 0, 0, 0, 1]
    assert batch["quads"].tolist() == [[[30, 30], [38, 30], [38, 38], [30, 38]]]
    assert batch["classes"].tolist() == [1]


def test_training_sees_the_tiles_with_objects():
    made, whole = pictures()

    tiles = Tiles(whole, with_objects(whole, np.arange(2)), skip=False, once=False)

    assert len(tiles) == 1
    batch = tiles[0]
    assert batch["tiles"].tolist() == [[0, 0, 0, 40, 40]]
    assert (batch["pixel_values"][0].permute(1, 2, 0).numpy() == made[0][10:, 30:]).all()
    assert batch["labels"].tolist() == [0]
    assert batch["quads"].tolist() == [[[30, 30], [38, 30], [38, 38], [30, 38]]]


def test_training_on_validation_as_well_takes_its_tiles_with_objects():
    _, whole = pictures()
    nothing = Tiles(whole, np.zeros(0, np.int64), skip=False, once=False)

    assert nothing.concat(Images(whole, np.arange(2), skip=False, once=True)).rows.tolist() == [3]


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("quarters", range(4))
def test_objects_are_where_they_are_seen_however_a_tile_is_turned(across, down, quarters):
    image = torch.zeros(3, 20, 20)
    image[:, 2:5, 4:14] = 1  # rows 2 to 4, columns 4 to 13
    corners = torch.tensor([[[4.0, 2], [14, 2], [14, 5], [4, 5]]])

    seen, moved = turned(image, corners, across, down, quarters)

    (left, top), (right, bottom) = moved[0].amin(0).int().tolist(), moved[0].amax(0).int().tolist()
    assert seen[:, top:bottom, left:right].eq(1).all()
    assert seen.sum() == 3 * (bottom - top) * (right - left) == image.sum()
