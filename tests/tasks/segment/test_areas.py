"""Scores of segmentation, against a confusion matrix in numpy."""

import numpy as np
import pytest
import torch

from flora.errors import DataError
from flora.tasks.metrics import Regions
from flora.tasks.segment.areas import areas


def by_confusion(called: np.ndarray, true: np.ndarray, classes: int) -> dict[str, float]:
    """mIoU, mean accuracy, pixel accuracy and each IoU as they are defined, from pairs of pixels one by one."""
    confusion = np.zeros((classes, classes), np.float64)
    for c, t in zip(called.ravel(), true.ravel(), strict=True):
        if t >= 0:
            confusion[t, c] += 1
    right, of_class, said = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    union = of_class + said - right
    iou = {f"IoU_{i}": right[i] / union[i] for i in range(classes) if union[i]}
    return {
        "mIoU": np.mean(list(iou.values())),
        "mean_accuracy": np.mean([right[i] / of_class[i] for i in range(classes) if of_class[i]]),
        "pixel_accuracy": right.sum() / confusion.sum(),
        **iou,
    }


@pytest.mark.parametrize("classes", [2, 11, 150])
def test_scores_of_random_predictions_are_those_of_a_confusion_matrix(classes):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(5, classes, 13, 17, generator=generator)
    labels = torch.randint(
        0, classes - 1, (5, 13, 17), generator=generator, dtype=torch.int16
    )  # one class never occurs
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
    kept = torch.cat([areas(logits[i : i + 2], labels[i : i + 2]) for i in (0, 2, 4)]).numpy()  # batch by batch
    scores = Regions([str(i) for i in range(classes)]).compute(predictions=kept, references=np.zeros(5))
    expected = by_confusion(logits.argmax(dim=1).numpy(), labels.numpy(), classes)
    assert scores.keys() == expected.keys()
    assert scores == pytest.approx(expected, abs=1e-6)


def test_three_pixels_by_hand():
    logits = torch.tensor([[[[9.0, 9.0, 0.0]], [[0.0, 0.0, 9.0]]]])  # called 0, 0, 1
    labels = torch.tensor([[[0, 1, 1]]])
    assert areas(logits, labels).tolist() == [[[1, 1], [2, 1], [1, 2]]]
    scores = Regions(["cat", "dog"]).compute(predictions=areas(logits, labels), references=[3])
    third = {"mIoU": 0.5, "mean_accuracy": 0.75, "pixel_accuracy": 2 / 3, "IoU_cat": 0.5, "IoU_dog": 0.5}
    assert scores == pytest.approx(third)


def test_without_a_pixel_that_counts_there_is_no_score():
    kept = areas(torch.randn(2, 3, 4, 4), torch.full((2, 4, 4), -100))
    with pytest.raises(DataError, match="none of the 2 images that are evaluated has a pixel that counts"):
        Regions(["a", "b", "c"]).compute(predictions=kept.numpy(), references=np.zeros(2))


def test_a_pixel_without_finite_logits_is_wrong():
    logits = torch.tensor([[[[9.0, float("nan")]], [[0.0, 0.0]]]])
    assert areas(logits, torch.tensor([[[0, 0]]])).tolist() == [[[1, 0], [1, 0], [2, 0]]]
    assert areas(logits, torch.tensor([[[-100, -100]]])).sum() == 0
