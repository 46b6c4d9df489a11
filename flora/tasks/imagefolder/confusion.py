"""A picture of which classes were taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flora.tasks.pictures import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NUMBERED_CLASSES = 15  # more leave no room for numbers
_NAMED_CLASSES, _LETTERS = 40, 30  # more do not fit beside a picture
_UPRIGHT = 4  # letters of names that fit below a cell as they are


def draw_confusion(counts: np.ndarray, names: Sequence[str], path: Path) -> None:
    """A picture of counts ``[true, called]``, each row as shares of its class; in percent where there is room."""
    with drawing(path):
        confusion(counts, names).savefig(path)


def confusion(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """The figure of `draw_confusion`."""
    from matplotlib.figure import Figure

    few = len(names) <= _NUMBERED_CLASSES
    side = 4 + (0.35 if few else 0.2) * min(len(names), _NAMED_CLASSES)
    figure = Figure((side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= _NAMED_CLASSES:
        shown = [_short(name) for name in names]
        slanted: dict[str, Any] = (
            {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if few else {"rotation": 90}
        )
        if few and max(map(len, shown)) <= _UPRIGHT:
            slanted = {}
        axes.set_xticks(range(len(names)), shown, **slanted)
        axes.set_yticks(range(len(names)), [f"{n} ({c})" for n, c in zip(shown, counts.sum(axis=1), strict=True)])
    for is_, called in np.argwhere(counts) if few else ():
        share = shares[is_, called]
        text = "<1" if share < 0.005 else f"{100 * share:.0f}"
        axes.text(called, is_, text, ha="center", va="center", fontsize=8, color="white" if share > 0.5 else "black")
    axes.set_xlabel("called")
    axes.set_ylabel("is (test images)")
    figure.colorbar(picture, label="share of the class" + (", percent in the cells" if few else ""), shrink=0.8)
    return figure


def _short(name: str) -> str:
    """A name for beside a picture, its ends where it is long, and where dollars would be a formula."""
    ends = name if len(name) <= _LETTERS else f"{name[: _LETTERS // 2]}…{name[1 - _LETTERS // 2 :]}"
    return ends.replace("$", r"\$")
