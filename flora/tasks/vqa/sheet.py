"""A picture of test images with what was asked and written."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flora.tasks.pictures import drawing
from flora.tasks.vqa.dialogues import IMAGE, Dialogue, Pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS, COLUMNS = 4, 6


def draw_sheet(shown: Sequence[tuple[Dialogue, str]], pictures: Pictures, path: Path) -> None:
    """A picture of images with their last question, what was written and, where it differs, the right answer."""
    with drawing(path):
        sheet(shown, pictures).savefig(path)


def sheet(shown: Sequence[tuple[Dialogue, str]], pictures: Pictures) -> Figure:
    """The figure of `draw_sheet`: as many frames as there are answers; one without an image is a line of text."""
    from matplotlib.figure import Figure

    columns = max(1, min(COLUMNS, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    figure = Figure((2.4 * columns, 3 * rows), layout="constrained")
    frames = figure.subplots(rows, columns, squeeze=False).flat
    for (dialogue, text), axes in zip(shown, frames, strict=False):  # in this order no frame is lost
        if dialogue.images:
            axes.imshow(pictures.rgb(dialogue.images[-1]))
        else:
            axes.text(0.5, 0.5, "no image", ha="center", va="center", fontsize=7, color="tab:gray")
        right = text.lower() == dialogue.answers[0].lower()
        words = dialogue.turns[-1][0].replace(IMAGE, "").strip()
        told = text if right else f"{text}  (not {dialogue.answers[0]})"
        axes.set_title(_short(words), fontsize=7)
        axes.set_xlabel(_short(told), fontsize=7, color="tab:green" if right else "tab:red")
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in frames:  # those left over, in the last row
        axes.remove()
    return figure


def _short(text: str) -> str:
    """At most two lines for under a picture."""
    return textwrap.fill(text, 38, max_lines=2, placeholder="...").replace("$", r"\$")
