"""DOTA's layout: what is read, and what is refused in one line; and the rendered stand-in."""

import numpy as np
import pytest
from PIL import Image
from shapely import Polygon

from flora.errors import DataError
from flora.tasks.oriented import dota, rendered
from flora.tasks.oriented.rendered import painted, scene
from tests.models.test_quads import shapely_iou
from tests.tasks.oriented.made import scenes, write_dota, write_photographs


@pytest.fixture
def folder(tmp_path):
    for number, split in enumerate(("train", "val")):
        write_dota(tmp_path / "dota", split, scenes(number, 10))
    return tmp_path / "dota"


def opened(folder, missing="error"):
    return dota.open_folder(folder, 0.2, 0, missing)


def labels(folder, split="train", number=1):
    return folder / split / "labelTxt" / f"P{number:04}.txt"


def test_lines_become_objects(folder):
    made = scenes(0, 10)

    annotated, rows, facts = opened(folder)

    objects = annotated.objects
    assert annotated.class_names == ["plane", "ship"]
    assert len(annotated) == 20
    for image in range(10):
        lines = [line.split() for line in made[image][1]]
        inside = objects.of(image)
        assert objects.corners[inside].reshape(-1, 8).tolist() == [[float(x) for x in line[:8]] for line in lines]
        assert [annotated.class_names[i] for i in objects.classes[inside]] == [line[8] for line in lines]
        assert objects.difficult[inside].tolist() == [line[9] == "1" for line in lines]
        assert annotated.images.sizes[image].tolist() == list(made[image][0].shape[:2])
    assert {split: len(part) for split, part in rows.items()} == {"train": 8, "validation": 2, "test": 10}
    assert rows["test"].tolist() == list(range(10, 20))  # val is the test, as the test has no public labels
    assert facts["split_rule"] == "validation a drawn 20.0% of train, seed 0"


def test_a_test_with_labels_is_the_test(folder):
    write_dota(folder, "test", scenes(2, 5))

    _, rows, facts = opened(folder)

    assert {split: len(part) for split, part in rows.items()} == {"train": 10, "validation": 10, "test": 5}
    assert facts["split_rule"] == "as in the files"


def test_a_test_without_labels_is_left_aside(folder):
    write_dota(folder, "test", scenes(2, 5))
    for path in (folder / "test" / "labelTxt").iterdir():
        path.unlink()
    (folder / "test" / "labelTxt").rmdir()

    assert len(opened(folder)[0]) == 20


def test_classes_come_in_dotas_order_or_by_name(folder):
    path = labels(folder)
    line = "10 10 30 10 30 20 10 20 {} 0\n"
    path.write_text(line.format("helicopter") + line.format("bridge"))
    assert opened(folder)[0].class_names == ["plane", "bridge", "ship", "helicopter"]
    path.write_text(line.format("wagon") + line.format("barge"))

    assert opened(folder)[0].class_names == ["barge", "plane", "ship", "wagon"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("10 10 30 10 30 20 10 20 ship", "line 3: it has 9 fields, not the 10 of x1 y1"),
        ("10 10 30 10 30 20 10 20 large ship 0", "line 3: it has 11 fields"),
        ("10 10 30 10 30 20 10 x ship 0", "line 3: could not convert string to float: 'x'"),
        ("10 10 30 10 30 20 10 20 ship no", "line 3: invalid literal for int"),
        ("10 10 30 10 30 20 10 nan ship 0", "line 3: .* has a number that cannot be"),
        ("10 10 30 10 30 20 10 inf ship 0", "line 3: .* has a number that cannot be"),
        ("10 10 30 10 30 20 10 20 ship -1", "line 3: .* has a number that cannot be"),
        ("900 10 930 10 930 20 900 20 ship 0", "the object at 900 10 .* is not inside the image of 100 x 80 pixels"),
    ],
)
def test_a_line_that_cannot_be_is_named(folder, line, said):
    labels(folder).write_text(f"imagesource:GoogleEarth\ngsd:null\n{line}\n")

    with pytest.raises(DataError, match=rf"P0001\.txt.*{said}") as error:
        opened(folder)
    assert "\n" not in str(error.value)


def test_an_object_may_reach_out_of_its_image(folder):
    labels(folder).write_text("90 10 106.5 10 106.5 20 90 20 ship 0\n")

    assert opened(folder)[0].objects.corners.max() > 100


def test_outlines_that_cross_themselves_are_mended_and_counted(folder, capsys):
    square = Polygon([(10, 10), (30, 10), (30, 20), (10, 20)])
    rows = ["10 10 30 20 30 10 10 20", "10 10 30 10 10 20 30 20", "10 10 30 10 30 20 10 20"]
    labels(folder).write_text("".join(f"{row} ship 0\n" for row in rows))

    annotated, _, facts = opened(folder)

    for corners in annotated.objects.outlines(1):
        assert Polygon(corners).is_valid
        assert Polygon(corners).equals(square)
    assert "the outlines of 2 objects cross themselves (first P0001.txt)" in facts["warnings"][0]
    assert facts["warnings"][0] in capsys.readouterr().err


def test_two_images_of_one_name_are_told(folder):
    (folder / "val" / "images" / "P0002.jpg").write_bytes((folder / "val" / "images" / "P0002.png").read_bytes())
    with pytest.raises(DataError, match=r"P0002.jpg and P0002.png have the same labels P0002.txt"):
        opened(folder)


def test_a_class_that_train_has_not_is_unknown(folder):
    labels(folder, "val").write_text("10 10 30 10 30 20 10 20 harbor 0\n")

    with pytest.raises(DataError, match=r"P0001\.txt: class harbor is unknown; train has plane, ship"):
        opened(folder)


def test_an_image_without_labels_is_named(folder):
    labels(folder, number=4).unlink()

    with pytest.raises(
        DataError, match=r"1 of 10 images have no labels \(first P0004\.png\): add labelTxt/P0004\.txt, em"
    ):
        opened(folder)


def test_labels_of_another_set_are_told(folder):
    for path in [*(folder / "train" / "labelTxt").iterdir()]:
        path.rename(path.with_name(f"Q{path.name}"))

    with pytest.raises(DataError, match="labelTxt is of another set: none of its 10 files is of an image"):
        opened(folder)


def test_labels_without_an_image_are_an_error_or_left_out(folder):
    (folder / "train" / "images" / "P0003.png").unlink()

    with pytest.raises(DataError, match=r"the images of 1 files in labelTxt are not there \(first P0003\.txt\)"):
        opened(folder)
    assert len(opened(folder, "skip")[0]) == 19


def test_a_broken_image_is_an_error_or_counted(folder):
    (folder / "train" / "images" / "P0003.png").write_bytes(b"no image")

    with pytest.raises(DataError, match=r"P0003\.png: image cannot be decoded"):
        opened(folder)
    annotated = opened(folder, "skip")[0]
    assert annotated.skipped() == [str(folder / "train" / "images" / "P0003.png")]
    assert annotated.objects.of(3) == slice(annotated.objects.starts[3], annotated.objects.starts[3])


def test_what_is_no_text_is_told(folder):
    labels(folder).write_bytes(b"\xff\xfe\x00")

    with pytest.raises(DataError, match=r"P0001\.txt: not a readable text"):
        opened(folder)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_that_is_not_there_is_named(folder, split):
    (folder / split).rename(folder / "elsewhere")

    with pytest.raises(DataError, match=f"has no {split}/labelTxt"):
        opened(folder)


def test_objects_are_drawn_where_they_are_said_to_be():
    """In white on plain grey: what is white is as long and as wide as the object, and about its middle."""
    grey = Image.new("RGB", (128, 128), (128, 128, 128))
    for seed in range(8):
        sprites = scene(np.random.RandomState(seed), 128, 128)
        objects = [sprite for sprite in sprites if sprite.name in rendered.CLASSES]
        assert objects
        for sprite in objects:
            changed = (np.asarray(painted(grey.copy, [sprite._replace(colours=((255,) * 3, (255,) * 3))])) > 180).any(2)
            y, x = np.nonzero(changed)
            corners = sprite.at([(1, 1), (-1, 1), (-1, -1), (1, -1)])
            frame = (sprite.at([(1, 0)]) - sprite.middle)[0] / (sprite.length / 2)
            along = (np.stack([x, y], axis=1) + 0.5 - sprite.middle) @ frame
            across = (np.stack([x, y], axis=1) + 0.5 - sprite.middle) @ [-frame[1], frame[0]]
            for places, size in ((along, sprite.length), (across, sprite.width)):
                assert np.ptp(places) == pytest.approx(size, abs=2.2)
                assert abs(places.max() + places.min()) < 2
            assert corners.min() >= 0
            assert corners.max() <= 128


def test_objects_hardly_cover_each_other():
    for seed in range(20):
        made = [s.at([(1, 1), (-1, 1), (-1, -1), (1, -1)]) for s in scene(np.random.RandomState(seed), 128, 128)
                if s.name in rendered.CLASSES]  # fmt: skip
        for i, one in enumerate(made):
            for other in made[:i]:
                assert shapely_iou(one[None], other[None])[0] < 0.3


def test_what_is_rendered_is_the_same_again_and_other_with_another_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(rendered, "COUNTS", {"train": 4, "validation": 3, "test": 3})
    write_photographs(tmp_path / "rsscn7")
    one, rows, facts = rendered.open_rendered(tmp_path, 0)
    again, _, said = rendered.open_rendered(tmp_path, 0)
    other, _, _ = rendered.open_rendered(tmp_path, 1)

    assert facts == said
    assert facts["source"] == "rendered"
    assert {split: len(part) for split, part in rows.items()} == rendered.COUNTS
    assert len({*one.images.names}) == 10
    for first, second in zip(one.images.openers, again.images.openers, strict=True):
        assert first().tobytes() == second().tobytes()
    assert one.objects.corners.tolist() == again.objects.corners.tolist() != other.objects.corners.tolist()


def test_where_nothing_is_drawn_the_photograph_is_untouched():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))

    assert painted(noise.copy, []).tobytes() == noise.tobytes()


def test_without_photographs_nothing_is_rendered(tmp_path):
    with pytest.raises(DataError, match=r"there is no .*train\.parquet: task.dataset=rendered is drawn on"):
        rendered.open_rendered(tmp_path, 0)
    write_photographs(tmp_path / "rsscn7")

    with pytest.raises(DataError, match=r"has 6 images, task\.dataset=rendered needs 300"):
        rendered.open_rendered(tmp_path, 0)
