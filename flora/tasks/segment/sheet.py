"""A picture of test images with their true and their predicted classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flora.tasks.pictures import drawing, palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLES = ("image", "truth", "prediction")
_NAMED = 20  # more classes do not fit below the picture

# An image uint8 [H, W, 3] with its true and its predicted classes, int [H, W]; negative ones are black.
Shown = tuple[np.ndarray, np.ndarray, np.ndarray]


def draw_sheet(shown: Sequence[Shown], names: Sequence[str], path: Path) -> None:
    """A picture with a line for each image: itself, truth, prediction; the colours of few classes are named below."""
    with drawing(path):
        sheet(shown, names).savefig(path)


def sheet(shown: Sequence[Shown], names: Sequence[str]) -> Figure:
    """The figure of `draw_sheet`."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = palette(len(names))
    figure = Figure((9, 2.3 * max(len(shown), 1) + 0.8), layout="constrained")
    frames = figure.subplots(max(len(shown), 1), len(_TITLES), squeeze=False)
    for row, (image, truth, called) in zip(frames, shown, strict=False):
        for axes, picture in zip(row, (image, _coloured(truth, colours), _coloured(called, colours)), strict=True):
            axes.imshow(picture)
    for axes in frames.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    for axes, title in zip(frames[0], _TITLES, strict=True):
        axes.set_title(title, fontsize=9)
    there = np.unique(np.concatenate([np.ravel(part) for _, *both in shown for part in both] or [np.zeros(0, int)]))
    seen = [index for index in range(len(names)) if index in there]
    if len(seen) <= _NAMED:
        patches = [Patch(color=colours[i] / 255, label=names[i].replace("$", r"\$")) for i in seen]
        figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize=7)
    return figure


def _coloured(classes: np.ndarray, colours: np.ndarray) -> np.ndarray:
    return np.where((classes >= 0)[..., None], colours[np.maximum(classes, 0)], 0).astype(np.uint8)
