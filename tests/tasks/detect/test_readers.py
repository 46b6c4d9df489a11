"""Annotation files: what is read from them, and what is refused in one line."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from flora.errors import DataError
from flora.tasks.detect import coco, parquet
from flora.tasks.detect.dataset import AnnotatedImages
from flora.tasks.detect.objects import Annotated, check_polygons, mask_of
from tests.tasks.detect.made import SQUARES, squares, write_coco, write_parquet


def annotations(folder, split="train2017"):
    return folder / "annotations" / f"instances_{split}.json"


def test_both_layouts_give_the_same_objects(tmp_path):
    made = squares(0, 5)
    write_parquet(tmp_path / "train.parquet", made)
    write_coco(tmp_path, "train2017", made)

    table, names, facts = parquet.read([tmp_path / "train.parquet"])
    files, their_names, _ = coco.read(annotations(tmp_path))

    assert names == their_names == list(SQUARES)
    assert facts["train.parquet"]["rows"] == 5
    assert table.sizes.tolist() == files.sizes.tolist() == [list(image.shape[:2]) for image, _, _ in made]
    assert np.diff(table.objects.starts).tolist() == [len(boxes) for _, boxes, _ in made]
    assert table.objects.boxes.tolist() == [box for _, boxes, _ in made for box in boxes]
    assert table.objects.classes.tolist() == [label for _, _, classes in made for label in classes]
    for image in range(5):  # the file has its objects in another order
        assert listed(files.objects, image) == listed(table.objects, image)


def listed(objects, image):
    """Boxes, classes and areas of an image."""
    inside = objects.of(image)
    columns = objects.boxes[inside], objects.classes[inside, None], objects.areas[inside, None]
    return sorted(np.concatenate(columns, axis=1).tolist())


def test_masks_are_polygons_or_run_lengths(tmp_path):
    write_coco(tmp_path, "train2017", squares(1, 6))

    objects = coco.read(annotations(tmp_path))[0].objects

    kinds = {type(outline) for outline in objects.masks}
    assert kinds == {list, dict}
    image = np.repeat(np.arange(6), np.diff(objects.starts))
    for (x, y, w, h), outline, i in zip(objects.boxes.astype(int), objects.masks, image, strict=True):
        mask = mask_of(outline, *((48, 64) if i % 2 else (64, 48)))
        assert mask[y : y + h, x : x + w].all()
        assert mask.sum() == w * h


def test_a_batch_holds_images_of_different_sizes_and_what_there_is_to_learn(tmp_path):
    made = squares(2, 3)
    whole = write_coco(tmp_path, "train2017", made)
    whole["annotations"][0]["iscrowd"] = 1  # of the last image
    crowd = whole["annotations"][0]["bbox"]
    annotations(tmp_path).write_text(json.dumps(whole))
    part, names, _ = coco.read(annotations(tmp_path))
    images = AnnotatedImages(Annotated.of([part], names), np.arange(3), masks=True)

    batch = images.__getitems__([2, 0, 1])

    assert batch["labels"].tolist() == [2, 0, 1]
    assert batch["pixel_values"].shape == (3, 3, 64, 64)
    assert batch["sizes"].tolist() == [[64, 48], [64, 48], [48, 64]]
    assert (batch["pixel_values"][0, :, :64, :48].permute(1, 2, 0).numpy() == made[2][0]).all()
    assert batch["pixel_values"][0, :, :, 48:].eq(0).all()
    assert batch["found"].tolist() == [len(made[2][1]) - 1, 0, len(made[1][1])]
    corners = [[x, y, x + w, y + h] for x, y, w, h in made[2][1] if [x, y, w, h] != crowd]
    assert sorted(batch["boxes"][: batch["found"][0]].tolist()) == sorted(corners)
    for box, mask in zip(batch["boxes"].int().tolist(), batch["masks"], strict=True):
        left, top, right, bottom = box
        assert mask.sum() == mask[top:bottom, left:right].sum() == (right - left) * (bottom - top)


def test_boxes_that_reach_out_by_rounding_are_cut_and_those_without_area_are_not_learnt(tmp_path):
    image = squares(0, 2)[1][0]
    write_parquet(tmp_path / "train.parquet", [(image, [[60.5, 40, 4, 8.5], [3, 3, 0, 5]], [1, 2])])
    part, names, _ = parquet.read([tmp_path / "train.parquet"])

    batch = AnnotatedImages(Annotated.of([part], names), np.arange(1))[0]

    assert batch["boxes"].tolist() == [[60.5, 40, 64, 48]]
    assert batch["classes"].tolist() == [1]


@pytest.mark.parametrize(
    "box", [[60, 0, 9, 9], [-3, 0, 9, 9], [0, 45, 9, 9], [5, 5, -2, 4], [float("nan"), 0, 1, 1]], ids=str
)
def test_a_box_outside_its_image_is_named(tmp_path, box):
    image = squares(0, 2)[1][0]
    write_parquet(tmp_path / "train.parquet", [(image, [], []), (image, [[0, 0, 9, 9], box], [0, 1])])

    with pytest.raises(DataError, match=r"train.parquet, row 1: box \[.* is not inside the image of 64 x 48 pixels"):
        parquet.read([tmp_path / "train.parquet"])


def with_names(path, names):
    """The same table, whose metadata names other classes."""
    table = pq.read_table(path)
    said = json.loads(table.schema.metadata[b"huggingface"])
    said["info"]["features"]["objects"]["category"]["feature"]["names"] = names
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(said)}), path)
    return path


def test_an_unknown_class_id_is_named(tmp_path):
    image = squares(0, 2)[1][0]
    write_parquet(tmp_path / "train.parquet", [(image, [], []), (image, [[0, 0, 9, 9]], [2])])
    with pytest.raises(DataError, match=r"train.parquet, row 1: class id 2 is unknown, the file names 2 classes"):
        parquet.read([with_names(tmp_path / "train.parquet", ["red", "green"])])
    whole = write_coco(tmp_path, "train2017", [(image, [[0.0, 0.0, 9.0, 9.0]], [0])])
    whole["annotations"][0]["category_id"] = 91
    annotations(tmp_path).write_text(json.dumps(whole))

    with pytest.raises(DataError, match="annotation 1 has the unknown class id 91; the file names 3 classes"):
        coco.read(annotations(tmp_path))


def test_an_annotation_file_of_another_set_is_told(tmp_path):
    write_coco(tmp_path, "train2017", squares(0, 4))
    write_coco(tmp_path, "val2017", squares(1, 4))
    for file in (tmp_path / "val2017").iterdir():
        os.rename(file, file.with_name(f"val_{file.name}"))

    with pytest.raises(DataError, match=r"val2017.json is of another set: none of its 4 images \(first 000.png\)"):
        coco.read(annotations(tmp_path, "val2017"))


def test_annotations_for_another_size_are_told_when_the_image_is_opened(tmp_path):
    whole = write_coco(tmp_path, "train2017", squares(0, 4))
    whole["images"][0] |= {"height": 100, "width": 100}
    annotations(tmp_path).write_text(json.dumps(whole))
    part, names, _ = coco.read(annotations(tmp_path))

    with pytest.raises(DataError, match="has 48 x 64 pixels, its annotations are for 100 x 100"):
        AnnotatedImages(Annotated.of([part], names), np.arange(4))[0]


def change(whole, key, number, **fields):
    whole[key][number] |= fields
    return whole


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda whole: change(whole, "annotations", 0, image_id=7), "is of image 7, which is not listed"),
        (lambda whole: change(whole, "images", 0, id=10), "twice"),
        (lambda whole: change(whole, "categories", 0, id=10), "1 category ids are there twice: mend"),
        (lambda whole: whole | {"images": None}, "no file of COCO's instances .*it needs images"),
        (lambda whole: [whole], "no file of COCO's instances"),
        (
            lambda whole: change(whole, "annotations", 0, segmentation={"size": [9, 9], "counts": [81]}),
            "has a mask of 9 x 9 pixels, its image has",
        ),
    ],
)
def test_a_broken_annotation_file_is_told(tmp_path, edit, said):
    whole = write_coco(tmp_path, "train2017", squares(0, 4))
    annotations(tmp_path).write_text(json.dumps(edit(whole)))

    with pytest.raises(DataError, match=said):
        coco.read(annotations(tmp_path))


@pytest.mark.parametrize(
    "outline",
    [
        [[1, 2, 3]],
        [["x", "y", "z"] * 2],
        {"size": [48, 64], "counts": "garbage!!"},
        {"size": [48, 64], "counts": [1, 2, 3]},
        {"size": [48, 64], "counts": None},
    ],
)
def test_an_outline_that_is_none_is_told_with_its_image(tmp_path, outline):
    made = [(np.zeros((48, 64, 3), np.uint8), [[1.0, 1.0, 9.0, 9.0]] * 2, [0, 1])]
    whole = write_coco(tmp_path, "train2017", made)
    outlined = [entry | ({"segmentation": outline} if entry["id"] == 2 else {}) for entry in whole["annotations"]]
    annotations(tmp_path).write_text(json.dumps(whole | {"annotations": outlined}))
    part, names, _ = coco.read(annotations(tmp_path))
    images = AnnotatedImages(Annotated.of([part], names), np.arange(1), masks=True)

    with pytest.raises(DataError, match=r"000\.png: the mask of its object 0 is no outline of COCO's .*: mend") as told:
        images[0]
    assert "\n" not in str(told.value)
    assert len(AnnotatedImages(Annotated.of([part], names), np.arange(1))[0]["boxes"]) == 2, "boxes alone need none"


@pytest.mark.parametrize("outline", [[[0.1, 0.2, 0.3, 0.2, 0.3, 0.4]], [[900, 10, 950, 10, 950, 60]]])
def test_an_outline_that_is_not_at_its_box_is_told(tmp_path, outline):
    made = squares(0, 3)
    whole = write_coco(tmp_path, "train2017", made)
    whole["annotations"][0] |= {"segmentation": outline, "bbox": [20.0, 20.0, 12.0, 12.0]}
    path = tmp_path / "annotations" / "instances_train2017.json"
    path.write_text(json.dumps(whole))
    part, names, _ = coco.read(path)
    with pytest.raises(DataError, match=r"002.png: the polygons of its object \d span .*, its box 20 20 32 32"):
        check_polygons(Annotated.of([part], names))


def test_outlines_at_their_boxes_pass(tmp_path):
    write_coco(tmp_path, "train2017", squares(0, 6))
    part, names, _ = coco.read(tmp_path / "annotations" / "instances_train2017.json")
    check_polygons(Annotated.of([part], names))


def test_images_that_are_not_there_are_an_error_or_counted(tmp_path):
    write_coco(tmp_path, "train2017", squares(0, 4))
    (tmp_path / "train2017" / "002.png").unlink()

    with pytest.raises(DataError, match=r"1 of the 4 images .* are not there \(first 002.png\)"):
        coco.read(annotations(tmp_path))
    part, names, _ = coco.read(annotations(tmp_path), missing="skip")
    images = AnnotatedImages(Annotated.of([part], names), np.arange(4), skip=True)
    assert images.__getitems__([1, 2, 3])["labels"].tolist() == [1, 3]
    assert images.catalogue.skipped() == [str(tmp_path / "train2017" / "002.png")]


def test_an_unreadable_image_is_an_error_or_counted_and_never_leaves_a_batch_empty(tmp_path):
    made = squares(0, 4)
    made[2] = (b"no image", [[0, 0, 9, 9]], [0])
    write_parquet(tmp_path / "train.parquet", made)
    part, names, _ = parquet.read([tmp_path / "train.parquet"])

    with pytest.raises(DataError, match="row 2: image cannot be decoded"):
        AnnotatedImages(Annotated.of([part], names), np.arange(4)).__getitems__([1, 2])
    images = AnnotatedImages(Annotated.of([part], names), np.arange(4), skip=True, once=True)
    assert images.__getitems__([1, 2])["labels"].tolist() == [1]
    assert images.__getitems__([2])["labels"].tolist() == [3]
    assert not images.__getitems__([2])["counts"]


@pytest.mark.data
def test_the_blood_cells_are_as_described():
    folder = Path(os.environ["FLORA_DATA"]) / "bccd"

    counts = [
        (len(part), len(part.objects.boxes), names)
        for split in ("train", "validation", "test")
        for part, names, _ in [parquet.read([folder / f"{split}.parquet"])]
    ]

    cells = ["RBC", "WBC", "Platelets"]
    assert counts == [(205, 2804, cells), (87, 1137, cells), (72, 945, cells)]
