"""DOTA's average precision: of oriented boxes, its task 1, and of the upright boxes around them, its task 2."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from flora.models import quads
from flora.models.oriented import FIELDS
from flora.tasks.detect.scores import ImageScores, real
from flora.tasks.oriented.objects import Oriented

THRESHOLDS = np.arange(50, 100, 5) / 100
_EPSILON = np.finfo(np.float64).eps


class OrientedScores(ImageScores):
    """Average precision (AP) as DOTA_devkit has it, in [0, 1], a mean over the classes that occur.

    ``AP50`` is DOTA's own score: an object is found from an IoU above 0.5, and precision is read at eleven recalls as
    in VOC 2007. ``mAP`` is its mean over IoU from 0.5 to 0.95 in steps of 0.05. ``AP50_area`` takes the area under the
    curve instead of eleven recalls. ``AP50_horizontal`` is DOTA's task 2: of the upright boxes around detections and
    objects, in whole pixels. ``AP50_NAME`` is of a class. Objects marked as difficult are neither found nor missed.

    Args and attributes: see ImageScores.
    """

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        """Score the detections of images.

        Args:
            predictions: ``[B, D, 10]``, rows as ``flora.models.oriented`` gives them, in pixels of whole images.
            references: ``[B]``, numbers of the images.
            **kwargs: none.

        Raises:
            DataError: there is no object in these images.
            ValueError: an image is there twice.
        """
        found, images = self.keep(predictions, references)
        objects: Oriented = self.annotated.objects
        order = np.argsort(images)
        truth = np.concatenate([np.arange(*objects.of(i).indices(len(objects.classes))) for i in images[order]])
        if objects.difficult[truth].all():
            raise self.nothing_to_find()
        each = [real(found[place], FIELDS - 1).astype(np.float64) for place in order]
        rows = np.concatenate([np.zeros((0, FIELDS)), *each])
        of = np.repeat(images[order], [len(part) for part in each])
        aligned, upright = _best(rows, of, objects, images[order])
        there = np.unique(objects.classes[truth][~objects.difficult[truth]])
        eleven = np.array([[self._of(rows, aligned, c, truth, t) for t in THRESHOLDS] for c in there])  # [C, T, 2]
        horizontal = np.mean([self._of(rows, upright, c, truth, 0.5)[0] for c in there])
        names = self.annotated.class_names
        return {
            "mAP": float(eleven[:, :, 0].mean()),
            "AP50": float(eleven[:, 0, 0].mean()),
            "AP75": float(eleven[:, 5, 0].mean()),
            "AP50_area": float(eleven[:, 0, 1].mean()),
            "AP50_horizontal": float(horizontal),
            **{f"AP50_{names[c]}": float(value) for c, value in zip(there, eleven[:, 0, 0], strict=True)},
        }

    def _of(
        self, rows: np.ndarray, best: tuple[np.ndarray, np.ndarray], label: int, truth: np.ndarray, threshold: float
    ) -> tuple[float, float]:
        """The AP of a class, at eleven recalls and by area."""
        objects: Oriented = self.annotated.objects
        mine = np.flatnonzero(rows[:, 9] == label)
        mine = mine[np.argsort(-rows[mine, 8], kind="stable")]
        overlap, which = best[0][mine], best[1][mine]
        hit = overlap > threshold
        counted = ~(hit & objects.difficult[which])
        first = np.zeros(len(mine), bool)
        candidates = np.flatnonzero(hit & counted)
        first[candidates[np.unique(which[candidates], return_index=True)[1]]] = True
        right, wrong = np.cumsum(first), np.cumsum(counted & ~first)
        there = int(((objects.classes[truth] == label) & ~objects.difficult[truth]).sum())
        return average_precision(right / there, right / np.maximum(right + wrong, _EPSILON))


def average_precision(recall: np.ndarray, precision: np.ndarray) -> tuple[float, float]:
    """The best precision from a recall on: its mean over the recalls 0, 0.1, ..., 1, and its area over recall.

    Args:
        recall, precision: after each detection, the best first, ``[D]``.
    """
    # The bounds as DOTA_devkit computes them: 0.30000000000000004 is one.
    eleven = np.mean([precision[recall >= bound].max(initial=0) for bound in np.arange(0, 1.1, 0.1)])
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float(eleven), float((np.diff(recall, prepend=0) * best).sum())


def _best(
    rows: np.ndarray, of: np.ndarray, objects: Oriented, images: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The greatest overlap of each detection with an object of its image and class, and which that is; twice.

    Once of quadrilaterals, once of upright boxes that end with the pixel they name, as in VOC 2007.
    """
    shapes = torch.from_numpy(rows[:, :8].reshape(-1, 4, 2).copy())
    corners = torch.from_numpy(objects.corners)
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    found, there = quads.hulls(shapes) + whole, quads.hulls(corners) + whole
    starts = np.searchsorted(of, images), np.searchsorted(of, images, side="right")
    pairs = [torch.zeros(2, 0, dtype=torch.int64)]
    for image, first, last in zip(images.tolist(), *starts, strict=True):
        inside = objects.of(image)
        one, other = quads.touching(found[first:last], there[inside])
        pairs.append(torch.stack([one + int(first), other + inside.start]))
    one, other = torch.cat(pairs, dim=1)
    alike = torch.from_numpy(rows[:, 9].astype(np.int64))[one] == torch.from_numpy(objects.classes)[other]
    one, other = one[alike], other[alike]
    aligned = quads.overlaps(shapes[one], corners[other])
    upright = quads.overlaps(quads.corners(found[one]), quads.corners(there[other]))
    return tuple(_greatest(len(rows), one.numpy(), other.numpy(), o.numpy()) for o in (aligned, upright))  # type: ignore[return-value]


def _greatest(count: int, one: np.ndarray, other: np.ndarray, overlap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    value, which = np.zeros(count), np.zeros(count, np.int64)
    order = np.lexsort((other, -overlap, one))
    first = order[np.unique(one[order], return_index=True)[1]]
    value[one[first]], which[one[first]] = overlap[first], other[first]
    return value, which
