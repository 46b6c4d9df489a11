"""COCO's metrics of detected boxes and masks, computed by hotcoco, which equals pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import hotcoco
import numpy as np
import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image

from flora.errors import DataError
from flora.models.detection import FIELDS
from flora.tasks.detect.objects import Annotated
from flora.tasks.metrics import Scored

# Our names of metrics: hotcoco's.
NAMES = {"mAP": "AP", "AP50": "AP50", "AP75": "AP75", "AP_small": "APs", "AP_medium": "APm", "AP_large": "APl"}


class ImageScores(Scored):
    """Scores of detections against what there is in whole images, each of which counts once.

    Args:
        annotated: what there is in the images.

    Attributes:
        found, images: predictions and references of the last ``compute``.
    """

    found: np.ndarray
    images: np.ndarray

    def __init__(self, annotated: Annotated) -> None:
        self.annotated = annotated
        super().__init__()

    def keep(self, predictions: Any, references: Any) -> tuple[np.ndarray, np.ndarray]:
        """Take detections and numbers of images as arrays; ValueError where an image is there twice."""
        self.found, self.images = np.asarray(predictions), np.asarray(references).astype(np.int64)
        if len(np.unique(self.images)) != len(self.images):
            raise ValueError("an image is evaluated twice")
        return self.found, self.images

    def nothing_to_find(self) -> DataError:
        """What to raise where none of the images shows an object."""
        return DataError(
            f"none of the {len(self.images)} images that are evaluated shows an object: "
            "raise trainer.max_eval_examples or check the annotations"
        )


class CocoScores(ImageScores):
    """COCO's average precision over IoU from 0.5 to 0.95 (``mAP``), at one IoU, and by the size of objects.

    All in [0, 1], of boxes; of masks as well, as ``mask_mAP`` and so on, where the network finds masks. ``AP_small`` is
    over objects of less than 32 x 32 pixels, ``AP_medium`` less than 96 x 96, ``AP_large`` the others; a size that no
    object has is left out. The best 100 detections of an image count, as in COCO's.

    Args and attributes: see ImageScores.
    """

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        """Score the detections of images.

        Args:
            predictions: ``[B, D, 6]``, rows as ``flora.models.detection`` gives them, in pixels of the images; or
                ``[B, D, 6 + S * S]``, with the probabilities of a mask of ``S`` by ``S`` pixels over the box.
            references: ``[B]``, numbers of the images.
            **kwargs: none.

        Raises:
            DataError: there is no object in these images.
            ValueError: an image is there twice.
        """
        found, images = self.keep(predictions, references)
        truth = hotcoco.COCO(self._truth(images))
        scores = self._scored(truth, "bbox", list(self._boxes(found, images)))
        if found.shape[-1] > FIELDS and self.annotated.objects.masks is not None:
            masks = self._scored(truth, "segm", list(self._masks(found, images)))
            scores |= {f"mask_{name}": value for name, value in masks.items()}
        return scores

    def _scored(self, truth: Any, kind: str, detections: list[dict[str, Any]]) -> dict[str, float]:
        evaluation = hotcoco.COCOeval(truth, truth.load_res(detections), kind)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a table
            evaluation.run()
        results = evaluation.get_results()
        values = {name: results[theirs] for name, theirs in NAMES.items()}
        return {name: float(value) for name, value in values.items() if value >= 0}  # COCO's -1: no such object

    def _truth(self, images: np.ndarray) -> dict[str, Any]:
        table = self.annotated.objects
        annotations: list[dict[str, Any]] = []
        for image in images.tolist():
            for row in range(*table.of(image).indices(len(table.boxes))):
                annotations.append(
                    {
                        "id": row + 1,  # an id of 0 is taken for no match
                        "image_id": image,
                        "category_id": int(table.classes[row]),
                        "bbox": table.boxes[row].tolist(),
                        "area": float(table.areas[row]),
                        "iscrowd": int(table.crowds[row]),
                        **({} if table.masks is None else {"segmentation": table.masks[row]}),
                    }
                )
        if all(annotation["iscrowd"] for annotation in annotations):
            raise self.nothing_to_find()
        sizes = self.annotated.images.sizes[images].tolist()
        return {
            "images": [{"id": i, "height": h, "width": w} for i, (h, w) in zip(images.tolist(), sizes, strict=True)],
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in enumerate(self.annotated.class_names)],
        }

    def _boxes(self, found: np.ndarray, images: np.ndarray) -> Iterator[dict[str, Any]]:
        for image, rows in zip(images.tolist(), found, strict=True):
            for row in real(rows)[:, :FIELDS].astype(np.float64):
                left, top, right, bottom, score, label = row.tolist()
                box = [left, top, right - left, bottom - top]
                yield {"image_id": image, "category_id": int(label), "bbox": box, "score": score}

    def _masks(self, found: np.ndarray, images: np.ndarray) -> Iterator[dict[str, Any]]:
        for image, rows in zip(images.tolist(), found, strict=True):
            rows = real(rows)
            if not len(rows):
                continue
            height, width = self.annotated.images.sizes[image].tolist()
            whole = whole_masks(rows, height, width)
            for row, rle in zip(rows, hotcoco.mask.encode(np.asfortranarray(whole.transpose(1, 2, 0))), strict=True):
                yield {
                    "image_id": image,
                    "category_id": int(row[5]),
                    "segmentation": rle,
                    "score": float(row[4]),
                }


def real(rows: np.ndarray, place: int = FIELDS - 1) -> np.ndarray:
    """The detections of an image without padding, whose class at ``place`` is negative."""
    return rows[rows[:, place] >= 0]


def whole_masks(rows: np.ndarray, height: int, width: int) -> np.ndarray:
    """Masks of detections ``[D, 6 + S * S]`` as torchvision pastes them: uint8 ``[D, height, width]``."""
    side = round((rows.shape[1] - FIELDS) ** 0.5)
    small = torch.from_numpy(rows[:, FIELDS:].astype(np.float32)).view(-1, 1, side, side)
    boxes = torch.from_numpy(rows[:, :4].astype(np.float32))
    return (paste_masks_in_image(small, boxes, (height, width))[:, 0] > 0.5).to(torch.uint8).numpy()
