"""Re-rendered dSprites: geometry, labels, and splits that never overlap."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from flora.tasks import Vtab
from flora.tasks.vtab import dsprites

COMMON = {"name": "vtab", "epochs": 1}
SQUARE, ELLIPSE, HEART = range(3)
LARGEST = 5
ROWS, COLUMNS = np.mgrid[: dsprites.SIZE, : dsprites.SIZE]


def sprite_of(shape: int, scale: int = LARGEST, orientation: int = 0, x: int = 10, y: int = 20) -> np.ndarray:
    return dsprites.render(np.array([[shape, scale, orientation, x, y]]))[0] > 0


def white(image: np.ndarray) -> np.ndarray:
    """Coordinates of white pixels around (16 + x, 16 + y), complex, y down."""
    return (COLUMNS[image] - 26) + 1j * (ROWS[image] - 36)


AREAS = {SQUARE: (2 * 9.25) ** 2, ELLIPSE: np.pi * 14.2 * 7.1, HEART: (4 + np.pi) * 6.6**2}


@pytest.mark.parametrize("shape", AREAS)
def test_area_grows_with_the_square_of_the_scale(shape):
    for scale, factor in enumerate([0.5, 0.6, 0.7, 0.8, 0.9, 1.0]):
        # Counting pixel centres is exact on average; over 40 angles it errs by less than 2 %.
        mean = np.mean([sprite_of(shape, scale, orientation).sum() for orientation in range(40)])
        assert mean == pytest.approx(AREAS[shape] * factor**2, rel=0.02)


@pytest.mark.parametrize("shape", AREAS)
def test_centre_of_area_lies_on_the_position(shape):
    centres = [white(sprite_of(shape, LARGEST, orientation)).mean() for orientation in range(39)]
    assert np.abs(centres).max() < 0.2
    # In the sprite's own axes rounding averages out, an offset of the drawing would not.
    turned_back = np.array(centres) * np.exp(-2j * np.pi * np.arange(39) / 39)
    assert abs(turned_back.mean()) < 0.03


def test_a_step_in_position_moves_the_image_by_one_pixel_and_never_off_it():
    for shape in AREAS:
        corner = sprite_of(shape, orientation=7, x=0, y=0)
        for x, y in [(1, 0), (0, 1), (31, 31), (12, 5)]:
            moved = sprite_of(shape, orientation=7, x=x, y=y)
            assert np.array_equal(np.roll(corner, (y, x), axis=(0, 1)), moved)
            assert moved.sum() == corner.sum()
            assert not moved[[0, -1]].any()
            assert not moved[:, [0, -1]].any()


def drawn(angle: float, centre: complex, radius: float) -> np.ndarray:
    """Share of each pixel covered, as Pillow draws at ten times the size: a square, and with a radius a heart."""
    half_diagonal = np.sqrt(2) * (radius or 9.25)
    start = 0 if radius else np.pi / 4
    corners = centre + half_diagonal * np.exp(1j * (angle + start + np.pi / 2 * np.arange(4)))
    canvas = Image.new("L", (640, 640))
    draw = ImageDraw.Draw(canvas)
    draw.polygon([(10 * c.real, 10 * c.imag) for c in corners], fill=1)
    if radius:
        # y points down: the two upper sides are those next to the corner at -90 degrees.
        upper = centre + half_diagonal * np.exp(1j * (angle - np.pi / 2))
        for corner in (corners[0], corners[2]):
            middle = (upper + corner) / 2
            draw.circle((10 * middle.real, 10 * middle.imag), 10 * radius, fill=1)
    return np.asarray(canvas).reshape(64, 10, 64, 10).mean(axis=(1, 3))


@pytest.mark.parametrize(("shape", "radius"), [(SQUARE, 0), (HEART, 6.6)])
def test_square_and_heart_cover_what_pillow_draws(shape, radius):
    upright = drawn(0, 32 + 32j, radius)
    centroid = ((COLUMNS + 0.5 + 1j * (ROWS + 0.5)) * upright).sum() / upright.sum() - (32 + 32j)
    for orientation in range(40):
        angle = 2 * np.pi * orientation / 39
        coverage = drawn(angle, 26.5 + 36.5j - centroid * np.exp(1j * angle), radius)
        sprite = sprite_of(shape, orientation=orientation)
        assert sprite[coverage > 0.75].all()
        assert not sprite[coverage < 0.25].any()


def test_ellipse_has_the_moments_of_an_ellipse_at_its_angle():
    for orientation in range(40):
        points = white(sprite_of(ELLIPSE, orientation=orientation))
        along = points * np.exp(-2j * np.pi * orientation / 39)
        # A uniform ellipse has variance a^2 / 4 and b^2 / 4 along its axes.
        assert along.real.var() == pytest.approx(14.2**2 / 4, rel=0.04)
        assert along.imag.var() == pytest.approx(7.1**2 / 4, rel=0.04)


def test_the_last_orientation_is_the_first():
    for shape in AREAS:
        assert np.array_equal(sprite_of(shape, orientation=0), sprite_of(shape, orientation=39))


def test_combinations_are_all_different_and_y_runs_fastest():
    every = dsprites.factors_of(np.arange(dsprites.COMBINATIONS))
    assert len(every) == 737280
    assert every.max(axis=0).tolist() == [2, 5, 39, 31, 31]
    index = (((every[:, 0] * 6 + every[:, 1]) * 40 + every[:, 2]) * 32 + every[:, 3]) * 32 + every[:, 4]
    assert np.array_equal(index, np.arange(737280))


def test_location_is_where_the_sprite_is_in_the_image():
    splits = Vtab(dataset="dsprites_location", **COMMON).load(image_size=64, data_dir=None)
    assert (splits.num_classes, len(splits.class_names)) == (16, 16)
    for images, label in zip(splits.train.images[:200, 0].numpy() > 0, splits.train.labels[:200], strict=True):
        x = round(float(COLUMNS[images].mean())) - 16
        assert splits.class_names[label] == f"location {x // 2 * 2}-{x // 2 * 2 + 1}"
        assert label == 16 * x // 32


def test_orientation_classes_follow_vtabs_formula():
    factors = np.array([[0, 0, orientation, 0, 0] for orientation in range(40)])
    # floor(16 o / 40) = floor(o / 2.5): three and two angles in turn.
    expected = [c for c in range(16) for _ in range(3 if c % 2 == 0 else 2)]
    assert dsprites.orientation_labels(factors).tolist() == expected
    names = Vtab(dataset="dsprites_ori", **COMMON).load(image_size=64, data_dir=None).class_names
    assert names[:3] == ["orientation 0-2", "orientation 3-4", "orientation 5-7"]
    assert names[-1] == "orientation 38-39"


@pytest.mark.parametrize("test_size", ["default", "full", 50])
def test_splits_do_not_overlap_and_train_does_not_depend_on_the_test_size(monkeypatch, test_size):
    drawn = []
    factors_of = dsprites.factors_of
    monkeypatch.setattr(dsprites, "factors_of", lambda chosen: factors_of(drawn.append(chosen) or chosen))
    task = Vtab(dataset="dsprites_location", test_size=test_size, **COMMON)
    splits = task.load(image_size=64, data_dir=None)
    sizes = [800, 200, {"default": 2000, "full": 73728, 50: 50}[test_size]]
    assert [len(chosen) for chosen in drawn] == sizes
    assert len(np.unique(np.concatenate(drawn))) == sum(sizes)
    assert splits.facts["counts"] == dict(zip(["train", "validation", "test"], sizes, strict=True))
    assert splits.facts["sha256"]["train"] == "29bf90f8153d144a0b29c1a27ed3d081ad870ee0f9ac5b6e8a4fd474a75cef77"


def test_the_record_says_re_rendered_and_the_split_seed_moves_the_draw():
    seeds = [Vtab(dataset="dsprites_location", split_seed=s, **COMMON) for s in (0, 1)]
    facts = [task.load(image_size=64, data_dir=None).facts for task in seeds]
    assert facts[0]["source"] == facts[1]["source"] == "re-rendered"
    assert facts[0]["sha256"]["test"] != facts[1]["sha256"]["test"]


def test_other_sizes_are_resized_and_labels_are_never_augmented_away():
    task = Vtab(dataset="dsprites_location", test_size=3, **COMMON)
    small = task.load(image_size=32, data_dir=None, interpolation="bilinear").test
    source = task.load(image_size=64, data_dir=None).test.images[0, 0].numpy()
    expected = Image.fromarray(source).resize((32, 32), Image.Resampling.BILINEAR)
    assert np.array_equal(small.images[0, 2].numpy(), np.asarray(expected))
    assert task.augment() is None
