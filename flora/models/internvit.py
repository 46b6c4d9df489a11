"""InternViT-6B, as timm has none: its attention normalises queries and keys over the whole width, not head by head.

Chen et al. 2023, "InternVL", arXiv 2312.14238; sizes and names of tensors of OpenGVLab/InternViT-6B-224px. The
published code runs only where code of the hub is trusted; here its files are read into timm's network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.layers import Attention, RmsNorm
from timm.models import load_state_dict
from torch import Tensor, nn

from flora.errors import WeightsError, first_line
from flora.models.vision import UNTRAINED, TimmModel, load_backbone
from flora.models.weights import Source, Weights, read, resolve, sha256_of

_NAMES = (  # of the published files -> of timm's network
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.(ls[12])$", r".\1.gamma"),
)
_SIZES = {"embed_dim": 3200, "depth": 48, "num_heads": 25, "mlp_ratio": 4}
_HUB = "OpenGVLab/InternViT-6B-224px"


class InternVit(TimmModel):
    """InternViT-6B: 48 blocks of width 3200, an ``ImageSpec`` (flora.models.spec).

    Args:
        weights: a file of the published tensors, or the index of several (``pytorch_model.bin.index.json``,
            ``model.safetensors.index.json``) with these beside it.
        image_size: side of the square input in pixels; the published weights have positions for 224.
        architecture: sizes other than the published ones, by timm's names.
        name, pretrained, mean, std, interpolation, adapter_targets, head_init: see ``TimmModel``.
    """

    def __init__(
        self,
        name: str = "internvit_6b",
        pretrained: bool = True,
        weights: Weights | None = None,
        image_size: int = 224,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str | None = None,
        adapter_targets: str | Sequence[str] = "all",
        architecture: Mapping[str, Any] | None = None,
        head_init: str | None = None,
    ) -> None:
        images = (image_size, mean, std, interpolation)
        super().__init__(
            "vit_intern300m_patch14_448", name, pretrained, weights, *images, adapter_targets, head_init=head_init
        )
        kinds = {"qkv_bias": False, "qk_norm": True, "norm_layer": "rmsnorm", "attn_layer": _Attention}
        self.architecture = _SIZES | dict(architecture or {}) | kinds

    @property
    def facts(self) -> dict[str, Any]:
        """See TimmModel.facts; the files of an index have a checksum each."""
        facts = super().facts
        shards = _shards(resolve(self.weights)) if self.weights is not None and self.pretrained else []
        return facts | ({"shards": {path.name: {"sha256": sha256_of(path)} for path in shards}} if shards else {})

    def _hub(self) -> Source:
        raise WeightsError(
            f"{self.name}: the weights are {_HUB} on the hub, in several files: download that repository and name its "
            f"index, model.weights=FOLDER/pytorch_model.bin.index.json, or set {UNTRAINED}"
        )

    def _load(self, model: nn.Module, path: Path, by_order: bool) -> None:
        stored: dict[str, Tensor] = {}
        for part in _shards(path) or [path]:
            stored |= read(part, load_state_dict)
        load_backbone(model, {_renamed(name): t for name, t in stored.items()}, self.classifier, path, self.name)


class _WholeNorm(RmsNorm):
    """RMS norm over all heads together, of ``[B, heads, N, width / heads]``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2).flatten(2)).unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)


class _Attention(Attention):
    def __init__(self, dim: int, *arguments: Any, **options: Any) -> None:
        super().__init__(dim, *arguments, **options)
        place: dict[str, Any] = {key: options.get(key) for key in ("device", "dtype")}
        self.q_norm, self.k_norm = _WholeNorm(dim, **place), _WholeNorm(dim, **place)


def _renamed(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _shards(path: Path) -> list[Path]:
    """The files that an index names, which lie beside it; none for a file of tensors.

    Raises:
        WeightsError: the index cannot be read, or a file is not there.
    """
    if path.suffix != ".json":
        return []
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is no index of weights ({first_line(error)}): fetch it again") from error
    found = [path.parent / Path(str(name)).name for name in names]
    if missing := [part for part in found if not part.is_file()]:
        raise WeightsError(f"there is no file {missing[0]}, which {path.name} names: fetch it again")
    return found
