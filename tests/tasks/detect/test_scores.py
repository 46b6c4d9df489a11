"""COCO's metrics against pycocotools, and what is not left to it."""

import contextlib
import io

import numpy as np
import pytest

from flora.errors import DataError
from flora.tasks.detect.scores import NAMES, CocoScores, whole_masks
from tests.tasks.detect.made import HEIGHT, WIDTH, drawn, guesses


def theirs(annotated, found, kind):
    """What pycocotools says, from our tables by another way: its own mask format and its own loop."""
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools is in the extra dev")
    from pycocotools import mask
    from pycocotools.cocoeval import COCOeval

    objects, annotations, results = annotated.objects, [], []
    for image in range(len(annotated)):
        for i in range(objects.starts[image], objects.starts[image + 1]):
            annotation = {
                "id": i + 1,
                "image_id": image,
                "category_id": int(objects.classes[i]),
                "bbox": list(objects.boxes[i]),
                "area": objects.areas[i],
                "iscrowd": int(objects.crowds[i]),
            }
            if objects.masks is not None:
                annotation["segmentation"] = objects.masks[i]
                if annotation["iscrowd"]:
                    annotation["segmentation"] = mask.frPyObjects(objects.masks[i], HEIGHT, WIDTH)[0]
            annotations.append(annotation)
        for row in found[image]:
            if row[5] < 0:
                continue
            left, top, right, bottom, score, label = (float(number) for number in row[:6])
            result = {"image_id": image, "category_id": int(label), "score": score}
            if kind == "bbox":
                results.append(result | {"bbox": [left, top, right - left, bottom - top]})
            else:
                (whole,) = whole_masks(row[None], HEIGHT, WIDTH)
                results.append(result | {"segmentation": mask.encode(np.asfortranarray(whole))})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = {
            "images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in range(len(annotated))],
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in enumerate(annotated.class_names)],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:6]


@pytest.mark.parametrize("seed", range(3))
def test_boxes_score_as_pycocotools_scores_them(seed):
    annotated = drawn(seed)
    found = guesses(annotated, seed)

    ours = CocoScores(annotated).compute(predictions=found, references=np.arange(len(annotated)))

    assert list(ours) == list(NAMES)
    assert 0.05 < ours["mAP"] < 0.9
    np.testing.assert_allclose(list(ours.values()), theirs(annotated, found, "bbox"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_masks_score_as_pycocotools_scores_them(seed):
    annotated = drawn(seed, masks=True)
    found = guesses(annotated, seed, masks=True)

    ours = CocoScores(annotated).compute(predictions=found, references=np.arange(len(annotated)))

    masks = [ours[f"mask_{name}"] for name in NAMES]
    assert masks[1] > 0.01
    np.testing.assert_allclose(masks, theirs(annotated, found, "segm"), rtol=0, atol=1e-6)
    np.testing.assert_allclose([ours[n] for n in NAMES], theirs(annotated, found, "bbox"), rtol=0, atol=1e-6)


def test_detections_that_are_the_truth_score_one():
    annotated = drawn(0)
    objects = annotated.objects
    found = np.full((len(annotated), 9, 6), -100.0)
    for image in range(len(annotated)):
        for row, i in zip(found[image], range(*objects.of(image).indices(len(objects.boxes))), strict=False):
            x, y, w, h = objects.boxes[i]
            row[:] = x, y, x + w, y + h, 1, objects.classes[i]

    scores = CocoScores(annotated).compute(predictions=found, references=np.arange(len(annotated)))

    assert scores == dict.fromkeys(NAMES, 1.0)


def test_the_order_of_images_does_not_count():
    annotated = drawn(1)
    found, order = guesses(annotated, 1), np.random.default_rng(0).permutation(len(annotated))
    scores = CocoScores(annotated)

    assert scores.compute(predictions=found[order], references=order) == scores.compute(
        predictions=found, references=np.arange(len(annotated))
    )


def test_images_that_are_not_evaluated_do_not_count():
    annotated = drawn(2)
    found, some = guesses(annotated, 2), np.arange(10)
    few = drawn(2)
    objects = few.objects
    found_alone = found[:10]

    scores = CocoScores(annotated).compute(predictions=found_alone, references=some)

    objects.crowds[objects.starts[10] :] = True  # what is a crowd is neither found nor missed
    found[10:] = -100
    assert scores == CocoScores(few).compute(predictions=found, references=np.arange(len(few)))


def test_where_nothing_is_found_all_is_missed_and_sizes_that_are_not_there_are_left_out():
    annotated = drawn(0)
    annotated.objects.areas[:] = 50.0
    found = np.full((len(annotated), 5, 6), -100.0)

    scores = CocoScores(annotated).compute(predictions=found, references=np.arange(len(annotated)))

    assert scores == {"mAP": 0.0, "AP50": 0.0, "AP75": 0.0, "AP_small": 0.0}


def test_images_without_any_object_cannot_be_scored():
    annotated = drawn(0)
    annotated.objects.crowds[:] = True

    with pytest.raises(DataError, match=r"none of the 40 images .* shows an object"):
        CocoScores(annotated).compute(predictions=guesses(annotated, 0), references=np.arange(40))


def test_an_image_counts_once():
    annotated = drawn(0)

    with pytest.raises(ValueError, match="twice"):
        CocoScores(annotated).compute(predictions=guesses(annotated, 0)[[0, 0]], references=np.array([0, 0]))
