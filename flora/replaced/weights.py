"""What a layer offers for adaptation: the modes of each of its weights; and what patterns of names say about them."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flora.replaced.config import ReplacedConfig

ModeKind = Literal["channel", "kernel", "stack"]


@dataclass(frozen=True)
class AdaptedWeight:
    """One weight of a layer, seen as a tensor of N modes.

    Attributes:
        name: attribute path on the base layer, e.g. ``weight`` or ``out_proj.weight``.
        weight_shape: shape in which the layer stores it.
        shape: mode sizes; the stored weight is a reshape of this tensor.
        kinds: what each mode counts, which decides its rank.
        output_dim: dimension of the stored weight that counts outputs (use_dora has a magnitude for each); ``None``
            where it is not known.
    """

    name: str
    weight_shape: tuple[int, ...]
    shape: tuple[int, ...]
    kinds: tuple[ModeKind, ...]
    output_dim: int | None = 0

    @property
    def key(self) -> str:
        """Name of its parameters inside the adapter's containers, which allow no dots."""
        return self.name.replace(".", "_")

    @property
    def output_mode(self) -> int | None:
        """The mode that counts outputs, of several in a fold the largest; ``None`` where no mode counts them alone."""
        if self.output_dim is None or not self.folded:
            return self.output_dim
        before = math.prod(self.weight_shape[: self.output_dim])
        within = before * self.weight_shape[self.output_dim]
        ends = [
            math.prod(self.shape[: mode + 1]) for mode in range(len(self.shape))
        ]  # entries up to and with each mode
        if within not in ends or (before > 1 and before not in ends):
            return None
        modes = [mode for mode, end in enumerate(ends) if before < end <= within]
        return max(modes, key=self.shape.__getitem__, default=None)

    @property
    def folded(self) -> bool:
        """Whether the modes differ from the stored dimensions."""
        return self.shape != self.weight_shape


def plain(name: str, shape: Sequence[int], kinds: Sequence[ModeKind], **kwargs: Any) -> AdaptedWeight:
    """A weight whose modes are its stored dimensions."""
    return AdaptedWeight(name, tuple(shape), tuple(shape), tuple(kinds), **kwargs)


def matching_pattern(patterns: dict[str, Any], name: str) -> Any:
    """Value of the first pattern that matches the whole name or an ending of it after a dot, else ``None``."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return None


def configured(patterns: dict[str, Any], layer_name: str, weight: AdaptedWeight) -> Any:
    """Value of the first pattern that matches the layer's name, or that followed by the weight's, else ``None``."""
    full_name = f"{layer_name}.{weight.name}".lstrip(".")
    for pattern, value in patterns.items():
        if any(matching_pattern({pattern: True}, name) for name in (layer_name, full_name)):
            return value
    return None


def scaling_of(weight: AdaptedWeight, config: ReplacedConfig, layer_name: str) -> float:
    """Factor of the update: the constant scale, or alpha / r (alpha / sqrt(r)) with r as configured, unclipped."""
    if config.alpha is None:
        scale = configured(config.scale_pattern, layer_name, weight)
        return float(config.scale if scale is None else scale)  # type: ignore[arg-type]
    alpha = configured(config.alpha_pattern, layer_name, weight)
    alpha = config.alpha if alpha is None else alpha
    r = configured(config.rank_pattern, layer_name, weight)
    r = config.r if r is None else r
    if isinstance(r, list | tuple):
        if len(r) == len(weight.kinds):
            r = [rank for rank, kind in zip(r, weight.kinds, strict=True) if kind == "channel"] or r
        r = math.prod(r) ** (1 / len(r))
    return float(alpha / math.sqrt(r) if config.rank_stabilized else alpha / r)
