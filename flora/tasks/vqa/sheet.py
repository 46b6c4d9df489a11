"""A picture of test images with what was asked and written."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from flora.tasks.pictures import drawing
from flora.tasks.vqa.dialogues import IMAGE, Dialogue, Pictures

ROWS, COLUMNS = 4, 6


def draw_sheet(shown: Sequence[tuple[Dialogue, str]], pictures: Pictures, path: Path) -> None:
    """A picture of images with their last question, what was written and, where it differs, the right answer."""
    with drawing(path):
        _draw(shown, pictures, path)


def _draw(shown: Sequence[tuple[Dialogue, str]], pictures: Pictures, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((2.4 * COLUMNS, 2.7 * ROWS), layout="constrained")
    for axes, (dialogue, text) in zip(figure.subplots(ROWS, COLUMNS).flat, shown, strict=False):
        if dialogue.images:
            axes.imshow(pictures.rgb(dialogue.images[-1]))
        right = text.lower() == dialogue.answers[0].lower()
        words = dialogue.turns[-1][0].replace(IMAGE, "").strip()
        told = text if right else f"{text}  (not {dialogue.answers[0]})"
        axes.set_title(_short(words), fontsize=7)
        axes.set_xlabel(_short(told), fontsize=7, color="tab:green" if right else "tab:red")
    for axes in figure.axes:
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path)


def _short(text: str) -> str:
    """At most two lines for under a picture."""
    return textwrap.fill(textwrap.shorten(text, 80, placeholder="..."), 40).replace("$", r"\$")
