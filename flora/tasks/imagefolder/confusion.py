"""A picture of which classes were taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flora.tasks.pictures import drawing

_NAMED_CLASSES, _LETTERS = 40, 30  # more do not fit beside a picture


def draw_confusion(counts: np.ndarray, names: Sequence[str], path: Path) -> None:
    """A picture of counts ``[true, called]``, each row as shares of its class."""
    with drawing(path):
        _draw(counts, names, path)


def _draw(counts: np.ndarray, names: Sequence[str], path: Path) -> None:
    from matplotlib.figure import Figure

    side = 4 + 0.2 * min(len(names), _NAMED_CLASSES)
    figure = Figure((side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= _NAMED_CLASSES:
        shown = [_short(name) for name in names]
        axes.set_xticks(range(len(names)), shown, rotation=90)
        axes.set_yticks(range(len(names)), shown)
    axes.set_xlabel("called")
    axes.set_ylabel("is")
    figure.colorbar(picture, label="share of the class")
    figure.savefig(path)


def _short(name: str) -> str:
    """A name for beside a picture, where dollars would be a formula."""
    return (name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…").replace("$", r"\$")
