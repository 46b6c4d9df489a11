"""DOTA's average precision against shapely and a plain loop over detections."""

import numpy as np
import pytest
import shapely

from flora.errors import DataError
from flora.tasks.oriented.objects import Oriented
from flora.tasks.oriented.scores import OrientedScores, average_precision
from tests.tasks.oriented.made import annotated_of, drawn, guesses


def iou(one, other):
    one, other = shapely.Polygon(one), shapely.Polygon(other)
    common = one.intersection(other).area
    return common / (one.area + other.area - common)


def upright(one, other):
    """Of the boxes around both, whose last pixel belongs to them."""
    (a, b), (c, d) = ((q.min(0), q.max(0)) for q in (one, other))
    common = np.prod(np.maximum(np.minimum(b, d) - np.maximum(a, c) + 1, 0))
    return common / (np.prod(b - a + 1) + np.prod(d - c + 1) - common)


def theirs(annotated, found, threshold, overlap=iou, area=False):
    """The protocol of DOTA's evaluation: detections by score, each against the object that it overlaps most."""
    objects, values = annotated.objects, []
    for label in range(len(annotated.class_names)):
        inside = {i: range(*objects.of(i).indices(len(objects.classes))) for i in range(len(annotated))}
        truth = {i: [k for k in inside[i] if objects.classes[k] == label] for i in inside}
        positives = sum(not objects.difficult[k] for members in truth.values() for k in members)
        if not positives:
            continue
        detections = [(row[8], i, row[:8].reshape(4, 2)) for i in inside for row in found[i] if row[9] == label]
        taken, marks = set(), []
        for _, image, quad in sorted(detections, key=lambda detection: -detection[0]):
            best, which = max(((overlap(quad, objects.corners[k]), -k) for k in truth[image]), default=(-1, 0))
            if best > threshold and objects.difficult[-which]:
                continue
            marks.append(best > threshold and which not in taken)
            if marks[-1]:
                taken.add(which)
        right = np.cumsum(marks)
        recall, precision = right / positives, right / np.arange(1, len(marks) + 1)
        if area:
            steps = np.diff(np.concatenate([[0], recall]))
            values.append(sum(step * precision[i:].max() for i, step in enumerate(steps) if step))
        else:
            values.append(sum(max(precision[recall >= t], default=0) for t in np.arange(0, 1.1, 0.1)) / 11)
    return np.mean(values)


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_a_loop_over_shapelys_polygons(seed):
    annotated = drawn(seed)
    found = guesses(annotated, seed)

    ours = OrientedScores(annotated).compute(predictions=found, references=np.arange(len(annotated)))

    each = [theirs(annotated, found, t) for t in np.arange(0.5, 0.99, 0.05)]
    assert 0.1 < ours["mAP"] < 0.9
    assert ours["AP50"] == pytest.approx(each[0], abs=1e-6)
    assert ours["AP75"] == pytest.approx(each[5], abs=1e-6)
    assert ours["mAP"] == pytest.approx(np.mean(each), abs=1e-6)
    assert ours["AP50_area"] == pytest.approx(theirs(annotated, found, 0.5, area=True), abs=1e-6)
    assert ours["AP50_horizontal"] == pytest.approx(theirs(annotated, found, 0.5, upright), abs=1e-6)
    assert np.mean([ours[f"AP50_{name}"] for name in annotated.class_names]) == pytest.approx(ours["AP50"])


def test_detections_that_are_the_truth_score_one():
    annotated = drawn(0)
    objects = annotated.objects
    found = np.full((len(annotated), 9, 10), -100.0)
    for image in range(len(annotated)):
        for row, i in zip(found[image], range(*objects.of(image).indices(len(objects.classes))), strict=False):
            row[:] = *objects.corners[i].ravel(), 1, objects.classes[i]

    scores = OrientedScores(annotated).compute(predictions=found, references=np.arange(len(annotated)))

    assert list(scores.values()) == pytest.approx([1.0] * len(scores))


SQUARE = np.array([[0.0, 0], [10, 0], [10, 10], [0, 10]])


def alone(*rows, difficult=(False, False)):
    """Scores of an image with two squares of a class, the second 50 pixels beside the first."""
    objects = Oriented(np.stack([SQUARE, SQUARE + 50]), np.zeros(2, np.int64), np.array(difficult), np.array([0, 2]))
    found = np.array([[[*(SQUARE + shift).ravel(), score, 0] for shift, score in rows]])
    annotated = annotated_of(objects, np.array([[100, 100]]), ["a"])
    return OrientedScores(annotated).compute(predictions=found, references=[0])


def test_precision_at_eleven_recalls_by_hand():
    scores = alone((0, 0.9), (30, 0.8), (50, 0.7))

    # Right, wrong, right: precision 1 up to a recall of 1/2, then 2/3.
    assert scores["AP50"] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert scores["AP50_area"] == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_an_object_is_found_once():
    assert alone((0, 0.9), (0.5, 0.8), (50, 0.7)) == pytest.approx(alone((0, 0.9), (30, 0.8), (50, 0.7)))


def test_difficult_objects_are_neither_found_nor_missed():
    assert alone((0, 0.9), (50, 0.8), (50, 0.7), difficult=(False, True))["AP50"] == 1
    assert alone((0, 0.9), difficult=(False, True))["AP50"] == 1


def test_the_order_of_images_does_not_count():
    annotated = drawn(1)
    found, order = guesses(annotated, 1), np.random.default_rng(0).permutation(len(annotated))
    found[..., 8] = found[..., 8].round(1)  # many are equal
    scores = OrientedScores(annotated)

    assert scores.compute(predictions=found[order], references=order) == scores.compute(
        predictions=found, references=np.arange(len(annotated))
    )


def test_images_that_are_not_evaluated_do_not_count():
    annotated = drawn(2)
    found = guesses(annotated, 2)[:10]
    some = OrientedScores(annotated).compute(predictions=found, references=np.arange(10))

    first = annotated.objects.starts[10]
    objects = annotated.objects
    few = Oriented(objects.corners[:first], objects.classes[:first], objects.difficult[:first], objects.starts[:11])
    alone = annotated_of(few, annotated.images.sizes[:10], annotated.class_names)

    assert some == OrientedScores(alone).compute(predictions=found, references=np.arange(10))


def test_where_nothing_is_found_all_is_missed():
    annotated = drawn(0)

    scores = OrientedScores(annotated).compute(
        predictions=np.full((len(annotated), 1, 10), -100.0), references=np.arange(len(annotated))
    )

    assert set(scores.values()) == {0.0}


def test_images_without_any_object_cannot_be_scored():
    annotated = drawn(0)
    annotated.objects.difficult[:] = True

    with pytest.raises(DataError, match=r"none of the 30 images .* shows an object"):
        OrientedScores(annotated).compute(predictions=guesses(annotated, 0), references=np.arange(30))


def test_an_image_counts_once():
    annotated = drawn(0)

    with pytest.raises(ValueError, match="twice"):
        OrientedScores(annotated).compute(predictions=guesses(annotated, 0)[[0, 0]], references=np.array([0, 0]))


def test_no_detection_at_all_has_no_precision():
    assert average_precision(np.zeros(0), np.zeros(0)) == (0.0, 0.0)
