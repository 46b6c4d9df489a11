"""UPerNet: a decoder for semantic segmentation over the feature maps of a pretrained network."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

from flora.errors import ConfigError
from flora.models.feature_maps import DenseModel, FeatureMaps
from flora.models.spec import Kind


class AveragePool(nn.AdaptiveAvgPool2d):
    """Torch's adaptive average pooling; by means of slices where runs are deterministic, as its gradient is not."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps ``[B, C, H, W]`` to ``[B, C, *output_size]``."""
        if not torch.are_deterministic_algorithms_enabled():
            return super().forward(input)
        rows, columns = (_spans(size, self.output_size) for size in input.shape[-2:])
        cells = [input[..., top:bottom, left:right].mean((-2, -1)) for top, bottom in rows for left, right in columns]
        return torch.stack(cells, dim=-1).unflatten(-1, (len(rows), len(columns)))


def _spans(size: int, count: Any) -> list[tuple[int, int]]:
    """What each of ``count`` cells averages of a side, as torch has it."""
    return [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


class Segmenter(nn.Module):
    """transformers' UperNetForSemanticSegmentation, whose parts it has under the same names, over our backbone.

    transformers' own class builds its backbone from a name; ours comes with its weights.
    """

    def __init__(self, backbone: FeatureMaps, config: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.decode_head = UperNetHead(config, in_channels=backbone.channels)
        self.auxiliary_head = UperNetFCNHead(config, in_channels=backbone.channels)
        for pyramid in self.decode_head.psp_modules.blocks:
            pool: Any = pyramid.layers[0]
            pyramid.layers[0] = AveragePool(pool.output_size)  # a list of its own goes through its layers
            pyramid.add_module("0", pyramid.layers[0])
        for head in (self.decode_head, self.auxiliary_head):
            for module in head.modules():  # as transformers starts them
                if isinstance(module, nn.Conv2d):
                    nn.init.normal_(module.weight, std=config.initializer_range)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Floats ``[B, 3, H, W]`` to logits ``[B, C, ~H / 4, ~W / 4]``; in training those of the auxiliary head too.

        The auxiliary head sees the map at stride 16: ``[B, C, ~H / 16, ~W / 16]``.
        """
        maps = self.backbone(images)
        logits = self.decode_head(maps)
        return (logits, self.auxiliary_head(maps)) if self.training else logits


class UperNet(DenseModel):
    """UPerNet (arXiv 1807.10221) over a network of timm: a ``ModelSpec`` (flora.models.spec).

    Args:
        backbone: see ``DenseModel``.
        hidden_size: channels of the decoder; the auxiliary head has half as many.

    Raises:
        ConfigError: as of ``DenseModel``, or a size out of range.
    """

    kind: Kind = "segmentation"
    heads: ClassVar[tuple[str, ...]] = ("decode_head", "auxiliary_head")

    def __init__(self, backbone: Any, hidden_size: int = 512) -> None:
        super().__init__(backbone)
        if type(hidden_size) is not int or hidden_size < 2:
            raise ConfigError(f"task.hidden_size={hidden_size} must be a whole number of at least 2 channels")
        self.hidden_size = hidden_size

    def network(self, features: FeatureMaps, num_classes: int) -> nn.Module:
        """See DenseModel.network."""
        size = self.hidden_size
        config: Any = UperNetConfig(hidden_size=size, auxiliary_channels=size // 2)
        config.num_labels = num_classes
        return Segmenter(features, config)
