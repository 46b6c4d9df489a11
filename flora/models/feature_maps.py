"""Feature maps of pretrained networks, and what dense prediction builds over them: a backbone with fresh heads."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from flora.errors import ConfigError, first_line
from flora.models.spec import Kind
from flora.models.vision import TimmModel

STRIDES = (4, 8, 16, 32)


class OutputNorms(nn.Module):
    """A layer norm over the channels of each feature map.

    Networks that add up their blocks end in no norm at each stage. ConvNeXt's published segmenter and detector have
    these four, fresh (facebookresearch/ConvNeXt, semantic_segmentation/backbone/convnext.py).
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.each = nn.ModuleList(LayerNorm2d(count, eps=1e-6) for count in channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps ``[B, channels[i], h, w]`` in and out."""
        return [norm(features) for norm, features in zip(self.each, maps, strict=True)]


class FeatureMaps(nn.Module):
    """A pretrained classifier of timm without its head, which gives the last feature map at each of four strides.

    Layers keep the names that timm gives them, under ``network``.

    Args:
        network: as ``TimmModel.build`` or ``TimmModel.skeleton`` gives it; it loses its head.
        norms: end each map in a fresh layer norm (``OutputNorms``), under ``norms``.

    Attributes:
        strides: pixels of the image between neighbours in each map: 4, 8, 16, 32.
        channels: of each map.

    Raises:
        ConfigError: the network has no map at one of the strides, or does not give any.
    """

    strides = STRIDES

    def __init__(self, network: nn.Module, norms: bool) -> None:
        super().__init__()
        self.indices = _indices(network)
        every: Any = network.feature_info
        self.channels = tuple(int(every[index]["num_chs"]) for index in self.indices)
        try:  # what only the classifier used must not be adapted
            network.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)  # type: ignore[operator]
        except Exception as error:  # timm raises almost any type
            raise ConfigError(f"model: {type(network).__name__} gives no feature maps: {first_line(error)}") from error
        self.network = network
        self.norms = OutputNorms(self.channels) if norms else None

    def forward(self, images: Tensor) -> list[Tensor]:
        """Floats ``[B, 3, H, W]``, at least 32 pixels a side, to maps ``[B, channels[i], ~H / s, ~W / s]``, s a stride.

        A side that a stride does not divide is rounded up or down as the network does.
        """
        take: Any = self.network.forward_intermediates
        maps: list[Tensor] = take(images, indices=self.indices, intermediates_only=True)
        return maps if self.norms is None else self.norms(maps)


class DenseModel(ABC):
    """A backbone of timm with fresh heads for dense prediction: a ``ModelSpec`` (flora.models.spec) over another.

    Name, weights, adapter targets and the way images enter are the backbone's. The network has the backbone as
    ``backbone``, a ``FeatureMaps``; adapters go there, as the heads are what ``classifier`` names.

    Args:
        backbone: whose weights and architecture.

    Attributes:
        heads: names of the network's modules that are trained in full; fresh norms after the backbone come to them.

    Raises:
        ConfigError: a model that is none of timm's, has no feature maps at strides 4, 8, 16, 32, or takes images of one
            size alone.
    """

    kind: Kind
    heads: ClassVar[tuple[str, ...]]

    def __init__(self, backbone: Any) -> None:
        if not isinstance(backbone, TimmModel):
            raise ConfigError(f"model={backbone.name} has no feature maps: choose one of timm, as convnext")
        self.backbone = backbone
        self.name, self.adapter_targets = backbone.name, backbone.adapter_targets
        self.image_size, self.interpolation = backbone.image_size, backbone.interpolation
        self.mean, self.std, self.normalize = backbone.mean, backbone.std, backbone.normalize
        self._norms = backbone.timm_name.startswith("convnext")
        _check_sizes(backbone.skeleton())

    @property
    def classifier(self) -> list[str]:
        """See ModelSpec: the heads, and the norms after the backbone if there are some."""
        return [*(["backbone.norms"] if self._norms else []), *self.heads]

    @property
    def facts(self) -> dict[str, Any]:
        """See ModelSpec: those of the backbone."""
        return self.backbone.facts

    def build(self, num_classes: int, drop_path: float = 0.0) -> nn.Module:
        """See ModelSpec.build."""
        return self.network(FeatureMaps(self.backbone.build(1, drop_path), self._norms), num_classes)

    def skeleton(self, num_classes: int | None = None) -> nn.Module:
        """See ModelSpec.skeleton; two classes by default."""
        with torch.device("meta"):
            return self.network(FeatureMaps(self.backbone.skeleton(), self._norms), num_classes or 2)

    @abstractmethod
    def network(self, features: FeatureMaps, num_classes: int) -> nn.Module:
        """Put fresh heads over feature maps; the module keeps ``features`` as ``backbone``."""


def _indices(network: Any) -> list[int]:
    """Which of a network's intermediate outputs is the last at each stride."""
    reductions = [part["reduction"] for part in getattr(network, "feature_info", None) or []]
    if not hasattr(network, "forward_intermediates") or not {*STRIDES} <= {*reductions}:
        there = ", ".join(map(str, dict.fromkeys(reductions))) or "none"
        raise ConfigError(
            f"model: {type(network).__name__} has feature maps at strides {there}, dense prediction needs 4, 8, 16 and "
            "32: choose a hierarchical network, as model=convnext"
        )
    return [max(i for i, reduction in enumerate(reductions) if reduction == stride) for stride in STRIDES]


def _check_sizes(network: Any) -> None:
    """Whether a network on the meta device takes images that are neither square nor of its own size."""
    indices = _indices(network)
    try:
        with torch.no_grad():
            images = torch.zeros(1, 3, 64, 96, device="meta")
            network.eval().forward_intermediates(images, indices=indices, intermediates_only=True)
    except Exception as error:  # timm raises almost any type
        raise ConfigError(
            f"model: {type(network).__name__} does not take images of any size ({first_line(error)}), which dense "
            "prediction needs: choose another network, as model=convnext"
        ) from error
