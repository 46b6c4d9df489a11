"""Faster R-CNN and Mask R-CNN: torchvision's heads over the feature maps of a pretrained network."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.faster_rcnn import AnchorGenerator, FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from flora.errors import ConfigError
from flora.models.feature_maps import DenseModel, FeatureMaps
from flora.models.spec import Kind

FIELDS = 6  # of a detection: left, top, right, bottom, score, class; then the pixels of its mask, if it has one
PADDING = -100.0  # in the place of a detection that there is not


@dataclass(frozen=True)
class Sizes:
    """How large a detector is and how large it sees images; by default as torchvision's, for COCO.

    Attributes:
        short_sides: pixels of an image's short side; of several in training one is drawn, evaluation takes the last.
        longest_side: limits the other side.
        anchors: side in pixels of the anchors at each of five levels, each in three shapes.
        channels: of the feature pyramid and the mask head.
        hidden: width of the box head.
        proposals: boxes that the heads look at in an image, in training and in evaluation.
        regions: of them that training learns from.
    """

    short_sides: Sequence[int] = (800,)
    longest_side: int = 1333
    anchors: Sequence[int] = (32, 64, 128, 256, 512)
    channels: int = 256
    hidden: int = 1024
    proposals: tuple[int, int] = (2000, 1000)
    regions: int = 512

    def __post_init__(self) -> None:
        heads = (self.channels, self.hidden, *self.proposals, self.regions)
        numbers = (*self.short_sides, self.longest_side, *self.anchors, *heads)
        if not self.short_sides or not all(isinstance(number, int) and number > 0 for number in numbers):
            raise ConfigError("task: sizes of images, anchors and heads must be positive whole numbers")
        if len(self.anchors) != 5:
            raise ConfigError(f"task.anchors={list(self.anchors)}: there are five levels, name a side for each")
        if min(*self.short_sides, self.longest_side) < 32 or max(self.short_sides) > self.longest_side:
            raise ConfigError(
                f"task.short_sides={list(self.short_sides)} must lie between 32 and "
                f"task.longest_side={self.longest_side}"
            )


class DetectionModel(DenseModel):
    """Faster R-CNN over a backbone of timm, or Mask R-CNN: a ``ModelSpec`` (flora.models.spec).

    Ren et al. 2015 and He et al. 2017, with the feature pyramid of Lin et al. 2017, as torchvision has them. The
    pyramid and the heads are trained in full.

    Args:
        backbone: a ``TimmModel``.
        sizes: of images and heads.
        masks: find masks as well: Mask R-CNN.
    """

    kind: Kind = "detection"
    heads: ClassVar[tuple[str, ...]] = ("fpn", "rpn", "roi_heads")

    def __init__(self, backbone: Any, sizes: Sizes, masks: bool = False) -> None:
        super().__init__(backbone)
        self.sizes, self.masks = sizes, masks
        self.image_size = max(sizes.short_sides)

    def network(self, features: FeatureMaps, num_classes: int) -> nn.Module:
        """See DenseModel.network; the background comes to the classes."""
        return Detector(features, num_classes, self.sizes, self.masks, self.mean, self.std)


class WholeBoxes(BoxCoder):
    """Torchvision's, which would round boxes to bf16 where the network computes in it: by four pixels at a thousand."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """See BoxCoder.decode_single."""
        return super().decode_single(rel_codes.float(), boxes)


class Detector(nn.Module):
    """A feature pyramid, proposals and heads over feature maps; torchvision's parts, apart so that each is a head.

    Args:
        features: of the backbone.
        num_classes: without the background.
        sizes: of images and heads.
        masks: find masks as well.
        mean, std: per-channel statistics of images in [0, 1].
    """

    def __init__(
        self,
        features: FeatureMaps,
        num_classes: int,
        sizes: Sizes,
        masks: bool,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.backbone = features
        self.fpn = FeaturePyramidNetwork(list(features.channels), sizes.channels, LastLevelMaxPool())
        level = nn.Module()
        level.out_channels = sizes.channels  # type: ignore[assignment]  # all that torchvision asks of a backbone
        shapes = ((0.5, 1.0, 2.0),) * len(sizes.anchors)
        parts: dict[str, Any] = {
            "rpn_anchor_generator": AnchorGenerator(tuple((side,) for side in sizes.anchors), shapes),
            "box_head": TwoMLPHead(sizes.channels * 7**2, sizes.hidden),
            "box_predictor": FastRCNNPredictor(sizes.hidden, num_classes + 1),
        }
        if masks:
            parts["mask_head"] = MaskRCNNHeads(sizes.channels, (sizes.channels,) * 4, 1)
            parts["mask_predictor"] = MaskRCNNPredictor(sizes.channels, sizes.channels, num_classes + 1)
        build: Any = MaskRCNN if masks else FasterRCNN
        whole = build(
            level,
            min_size=tuple(sizes.short_sides),
            max_size=sizes.longest_side,
            image_mean=list(mean),
            image_std=list(std),
            rpn_post_nms_top_n_train=sizes.proposals[0],
            rpn_post_nms_top_n_test=sizes.proposals[1],
            box_batch_size_per_image=sizes.regions,
            **parts,
        )
        self.transform, self.rpn, self.roi_heads = whole.transform, whole.rpn, whole.roi_heads
        for part in (self.rpn, self.roi_heads):
            part.box_coder = WholeBoxes(part.box_coder.weights)
        self.masks = masks
        self.parts = ("objectness", "rpn_box_reg", "classifier", "box_reg", *(["mask"] if masks else []))

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> dict[str, Tensor]:
        """Losses of images, and where the network is not training what it finds in them.

        Args:
            images: floats in [0, 1] ``[3, H, W]``, of any size.
            targets: of each: ``boxes`` ``[N, 4]``, corners in pixels, ``labels`` int64 ``[N]`` from 1, and with masks
                ``masks`` uint8 ``[N, H, W]``. None: there are no losses, of a network that is not training.

        Returns:
            ``losses`` ``[4]``, of Mask R-CNN ``[5]``: proposals, their boxes, classes, boxes and masks. Not training:
            ``detections`` ``[B, 100, 6]``, rows of FIELDS in pixels of the images, or of PADDING; with masks
            ``[B, 100, 6 + 28 * 28]``, the probabilities of each over its box; NaN where feature maps are not finite.
        """
        stored = [(image.shape[-2], image.shape[-1]) for image in images]
        resized, wanted = self.transform(images, targets)
        levels = self.fpn(OrderedDict((str(i), level) for i, level in enumerate(self.backbone(resized.tensors))))
        if self.training:
            return {"losses": self._losses(resized, levels, wanted)}
        proposals, _ = self.rpn(resized, levels)
        found, _ = self.roi_heads(levels, proposals, resized.image_sizes)
        detections = self._as_rows(found, resized.image_sizes, stored)
        # The heads leave out what is not a number: nothing would seem to be there.
        whole = torch.stack([level.isfinite().flatten(1).all(dim=1) for level in levels.values()]).all(dim=0)
        outputs = {"detections": detections.masked_fill(~whole[:, None, None], torch.nan)}
        if targets is not None:
            outputs["losses"] = self._losses_in_evaluation(resized, levels, wanted)
        return outputs

    def _losses(self, images: Any, levels: Any, targets: Any) -> Tensor:
        proposals, of_proposals = self.rpn(images, levels, targets)
        _, of_heads = self.roi_heads(levels, proposals, images.image_sizes, targets)
        losses = of_proposals | of_heads
        return torch.stack([losses[f"loss_{name}"].float() for name in self.parts])

    def _losses_in_evaluation(self, images: Any, levels: Any, targets: Any) -> Tensor:
        """Those of training; the proposals to learn from are drawn alike each time, and by nobody else's numbers."""
        heads = (self.rpn, self.roi_heads)
        device = images.tensors.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            try:
                for head in heads:
                    head.train()
                return self._losses(images, levels, targets)
            finally:
                for head in heads:
                    head.eval()

    def _as_rows(self, found: list[dict[str, Tensor]], seen: list[Any], stored: list[Any]) -> Tensor:
        most = self.roi_heads.detections_per_img
        rows = []
        for one, before, after in zip(found, seen, stored, strict=True):
            boxes = resize_boxes(one["boxes"], before, after)
            columns = [boxes, one["scores"][:, None], one["labels"][:, None] - 1]
            if self.masks:
                columns.append(one["masks"].flatten(1))
            row = torch.cat([column.float() for column in columns], dim=1)
            rows.append(F.pad(row, (0, 0, 0, most - len(row)), value=PADDING))
        return torch.stack(rows)
