"""Gliding Vertex: Faster R-CNN that finds objects in any direction.

Xu et al. 2020 (arXiv 1911.09358). A corner glides on each side of a box: its place on the side, four numbers in [0, 1],
tells a quadrilateral in the box. A fifth, the obliqueness, is the share of the box that the quadrilateral covers. Where
it is near 1, the four are ambiguous and the box itself is the answer. An object is learnt as the smallest rectangle
around it. Chosen as all else stays torchvision's detector: neither proposals nor pooling turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss

from flora.models import quads
from flora.models.detection import PADDING, DetectionModel, Detector, Sizes
from flora.models.feature_maps import FeatureMaps

FIELDS = 10  # of a detection: x and y of four corners, score, class
UPRIGHT = 0.8  # obliqueness from which the box is the answer, as in the paper
AMBIGUOUS = 0.95  # from which an annotated object is no example for the places of its corners
GLIDES = 5  # numbers beside a box: corners on the top, right, bottom and left side, obliqueness
# Weights and kink of the further losses are those of MMRotate's Gliding Vertex (configs/gliding_vertex, @a7ae239).
BETA, OBLIQUENESS_WEIGHT = 1 / 3, 16.0
LEAST_SCORE = 0.05
CANDIDATES = 2000  # the best of an image, that are compared
OVERLAP = 0.1  # of two detections of a class that are one; between tiles as well


def glides_of(rectangles: Tensor) -> Tensor:
    """What the network learns of rectangles ``[N, 4, 2]`` beside the boxes around them: ``[N, 5]``, each in [0, 1].

    How far the uppermost corner is along the top side of the box, clockwise, and so on for the right, the bottom and
    the left side; then the obliqueness, 1 for a box without area. From ``AMBIGUOUS`` on the places are 0: a rectangle
    that is turned by a hair to one side or to the other has all of them at opposite ends.
    """
    left, top, right, bottom = quads.hulls(rectangles).unbind(-1)
    x, y = rectangles.unbind(-1)
    size = torch.finfo(rectangles.dtype).tiny
    width, height = (right - left).clamp(min=size), (bottom - top).clamp(min=size)

    def at(coordinate: Tensor, corner: Tensor) -> Tensor:
        return coordinate.gather(1, corner[:, None])[:, 0]

    upper = (at(x, y.argmin(dim=1)) - left) / width
    rightmost = (at(y, x.argmax(dim=1)) - top) / height
    lower = (right - at(x, y.argmax(dim=1))) / width
    leftmost = (bottom - at(y, x.argmin(dim=1))) / height
    space = (right - left) * (bottom - top)
    obliqueness = torch.where(space > 0, quads.areas(rectangles) / space.clamp(min=size), 1.0)[:, None]
    places = torch.stack([upper, rightmost, lower, leftmost], dim=1)
    return torch.cat([torch.where(obliqueness < AMBIGUOUS, places, 0.0), obliqueness], dim=1).clamp(0, 1)


def corners_of(boxes: Tensor, glides: Tensor) -> Tensor:
    """The quadrilaterals ``[N, 4, 2]`` that boxes ``[N, 4]`` with glides ``[N, 5]`` stand for."""
    left, top, right, bottom = boxes.unbind(-1)
    width, height = right - left, bottom - top
    upper, rightmost, lower, leftmost, obliqueness = glides.unbind(-1)
    turned = torch.stack(
        [
            torch.stack([left + upper * width, top], dim=-1),
            torch.stack([right, top + rightmost * height], dim=-1),
            torch.stack([right - lower * width, bottom], dim=-1),
            torch.stack([left, bottom - leftmost * height], dim=-1),
        ],
        dim=-2,
    )
    return torch.where(obliqueness[:, None, None] < UPRIGHT, turned, quads.corners(boxes))


class GlidingPredictor(FastRCNNPredictor):
    """Torchvision's classes and boxes of a region, with glides beside each box.

    Args:
        in_channels: of a region's features.
        num_classes: with the background.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes)
        self.glides = nn.Linear(in_channels, num_classes * GLIDES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features ``[N, D]`` to logits ``[N, C]``, changes of boxes ``[N, 4 C]`` and glides ``[N, C, 5]``."""
        scores, changes = super().forward(x)
        return scores.float(), changes.float(), self.glides(x).float().sigmoid().unflatten(1, (-1, GLIDES))


def glide_losses(glides: Tensor, labels: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of the places and of the obliqueness, both over the number of regions as that of boxes is.

    Args:
        glides: ``[N, C, 5]`` of regions.
        labels: int64 ``[N]``, 0 for background.
        wanted: ``[N, 5]``, of the objects that the regions show.
    """
    positive = labels > 0
    found = glides[torch.arange(len(labels), device=labels.device), labels]
    each = F.smooth_l1_loss(found, wanted, beta=BETA, reduction="none") * positive[:, None]
    clear = wanted[:, 4] < AMBIGUOUS
    count = max(len(labels), 1)
    return (each[:, :4] * clear[:, None]).sum() / count, OBLIQUENESS_WEIGHT * each[:, 4].sum() / count


class GlidingHeads(RoIHeads):
    """Torchvision's heads with glides: ``quads`` ``[D, 4, 2]`` in the place of ``boxes`` in what is found.

    The targets have ``glides`` ``[N, 5]`` beside ``boxes``. Boxes may reach out of the image, as objects do that a tile
    cuts.

    Args:
        heads: whose pooling, features and sampling they take.
        predictor: of classes, boxes and glides.
        most: detections of an image.
    """

    def __init__(self, heads: RoIHeads, predictor: GlidingPredictor, most: int) -> None:
        sampler: Any = heads.fg_bg_sampler
        matcher: Any = heads.proposal_matcher
        super().__init__(
            heads.box_roi_pool,
            heads.box_head,
            predictor,
            fg_iou_thresh=matcher.high_threshold,
            bg_iou_thresh=matcher.low_threshold,
            batch_size_per_image=sampler.batch_size_per_image,
            positive_fraction=sampler.positive_fraction,
            bbox_reg_weights=None,
            score_thresh=LEAST_SCORE,
            nms_thresh=OVERLAP,
            detections_per_img=most,
        )
        self.box_coder = heads.box_coder

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """See RoIHeads.forward; in training its losses, ``loss_glide`` and ``loss_obliqueness``."""
        labels, wanted = list[Tensor](), list[Tensor]()
        aims: Any = None
        if self.training:
            assert targets is not None
            proposals, matched, labels, aims = self.select_training_samples(proposals, targets)
            for target, which in zip(targets, matched, strict=True):
                glides = target["glides"]
                wanted.append((glides if len(glides) else glides.new_zeros(1, GLIDES))[which])
        seen = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        scores, changes, glides = self.box_predictor(seen)
        if not self.training:
            return self._found(scores, changes, glides, proposals), {}
        classifier, boxes = fastrcnn_loss(scores, changes, labels, aims)
        places, obliqueness = glide_losses(glides, torch.cat(labels), torch.cat(wanted))
        losses = {"classifier": classifier, "box_reg": boxes, "glide": places, "obliqueness": obliqueness}
        return [], {f"loss_{name}": loss for name, loss in losses.items()}

    def _found(
        self, scores: Tensor, changes: Tensor, glides: Tensor, proposals: list[Tensor]
    ) -> list[dict[str, Tensor]]:
        counts = [len(one) for one in proposals]
        # Without any proposal torchvision leaves the classes' boxes side by side.
        boxes = self.box_coder.decode(changes, proposals).reshape(*scores.shape, 4)
        parts = (boxes.split(counts), scores.softmax(dim=-1).split(counts), glides.split(counts))
        found = []
        for box, score, glide in zip(*parts, strict=True):
            good = (score > self.score_thresh) & ((box[..., 2:] - box[..., :2]) > 0.01).all(dim=-1)
            good[:, 0] = False  # the background
            rows, labels = good.nonzero().unbind(1)
            best = score[rows, labels].topk(min(CANDIDATES, len(rows))).indices
            rows, labels = rows[best], labels[best]
            shapes, values = corners_of(box[rows, labels], glide[rows, labels]), score[rows, labels]
            kept = quads.suppressed(shapes, values, labels, self.nms_thresh)[: self.detections_per_img]
            found.append({"quads": shapes[kept], "scores": values[kept], "labels": labels[kept]})
        return found


class OrientedDetector(Detector):
    """A ``Detector`` whose objects are quadrilaterals.

    Args:
        features: of the backbone.
        num_classes: without the background.
        sizes: of images and heads.
        most: detections of an image.
        mean, std: per-channel statistics of images in [0, 1].
    """

    def __init__(
        self,
        features: FeatureMaps,
        num_classes: int,
        sizes: Sizes,
        most: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__(features, num_classes, sizes, False, mean, std)
        self.roi_heads = GlidingHeads(self.roi_heads, GlidingPredictor(sizes.hidden, num_classes + 1), most)
        self.parts = ("objectness", "rpn_box_reg", "classifier", "box_reg", "glide", "obliqueness")

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> dict[str, Tensor]:
        """See Detector.forward.

        Args:
            images: floats in [0, 1] ``[3, H, W]``, of any size.
            targets: of each: ``quads`` ``[N, 4, 2]`` in pixels, x and y, and ``labels`` int64 ``[N]`` from 1.

        Returns:
            ``losses`` ``[6]``: proposals, their boxes, classes, boxes, glides, obliqueness. Not training:
            ``detections`` ``[B, most, 10]``, rows of FIELDS in pixels of the images, or of PADDING.
        """
        if targets is not None:
            targets = [self._learnt(target["quads"]) | {"labels": target["labels"]} for target in targets]
        return super().forward(images, targets)

    def _learnt(self, shapes: Tensor) -> dict[str, Tensor]:
        rectangles = quads.rectangles(shapes)
        # The transform resizes boxes; glides are the same at any size.
        return {"boxes": quads.hulls(rectangles), "glides": glides_of(rectangles)}

    def _as_rows(self, found: list[dict[str, Tensor]], seen: list[Any], stored: list[Any]) -> Tensor:
        rows = []
        for one, before, after in zip(found, seen, stored, strict=True):
            scale = one["quads"].new_tensor([after[1] / before[1], after[0] / before[0]])
            columns = [(one["quads"] * scale).flatten(1), one["scores"][:, None], one["labels"][:, None] - 1]
            row = torch.cat([column.float() for column in columns], dim=1)
            rows.append(F.pad(row, (0, 0, 0, self.roi_heads.detections_per_img - len(row)), value=PADDING))
        return torch.stack(rows)


class OrientedModel(DetectionModel):
    """Gliding Vertex over a backbone of timm: a ``ModelSpec`` (flora.models.spec).

    Args:
        backbone: a ``TimmModel``.
        sizes: of images and heads.
        most: detections of an image.
    """

    def __init__(self, backbone: Any, sizes: Sizes, most: int = 100) -> None:
        super().__init__(backbone, sizes)
        self.most = most

    def network(self, features: FeatureMaps, num_classes: int) -> nn.Module:
        """See DenseModel.network; the background comes to the classes."""
        return OrientedDetector(features, num_classes, self.sizes, self.most, self.mean, self.std)


def united(detections: Tensor) -> Tensor:
    """Detections of the tiles of an image ``[D, 10]``, in its pixels, without those found twice: ``[K, 10]``.

    The best come first; rows of PADDING go.
    """
    rows = detections[detections[:, FIELDS - 1] >= 0]
    shapes, scores, classes = rows[:, :8].unflatten(1, (4, 2)), rows[:, 8], rows[:, 9]
    return rows[quads.suppressed(shapes, scores, classes, OVERLAP)]
