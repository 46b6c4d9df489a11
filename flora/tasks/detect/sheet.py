"""A picture of test images with their objects and what was found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flora.tasks.base import draw
from flora.tasks.detect.objects import Annotated
from flora.tasks.detect.scores import real, whole_masks
from flora.tasks.images.decode import as_rgb
from flora.tasks.pictures import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN, COLUMNS = 12, 4
LEAST = 0.5  # score of a detection that is drawn
_BOX = [0, 1, 2, 1, 2, 3, 0, 3]  # the corners of left, top, right, bottom


def draw_sheet(
    annotated: Annotated, found: np.ndarray, images: np.ndarray, path: Path, numbers: int = 4, about: str = ""
) -> None:
    """A picture of some of these images; their objects dotted, detections of a score from LEAST in full lines.

    Args:
        annotated: where they are.
        found: detections, as the metric takes them.
        images: their numbers ``[B]``.
        path: of the picture.
        numbers: of a detection's outline: 4, left, top, right and bottom; or 8, x and y of four corners.
        about: what else to say of the images.
    """
    with drawing(path):
        sheet(annotated, found, images, numbers, about).savefig(path)


def sheet(annotated: Annotated, found: np.ndarray, images: np.ndarray, numbers: int = 4, about: str = "") -> Figure:
    """The figure of ``draw_sheet``: a colour for each class, on twelve images at most."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Polygon

    chosen = np.sort(draw(len(images), 0)[:SHOWN])
    columns = min(COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    colours = colormaps["tab10" if len(annotated.class_names) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    figure = Figure((4 * columns, 3.4 * rows + 0.6), layout="constrained")
    frames = figure.subplots(rows, columns, squeeze=False).flat
    seen = set[int]()
    for at, axes in zip(chosen.tolist(), frames, strict=False):
        number = int(images[at])
        picture = np.asarray(as_rgb(annotated.images.openers[number], annotated.images.names[number], "stored"))
        detections = real(found[at], numbers + 1)
        detections = detections[detections[:, numbers] >= LEAST]
        if len(detections) and detections.shape[1] > numbers + 2:
            picture = picture.copy()
            for row, mask in zip(detections, whole_masks(detections, *picture.shape[:2]).astype(bool), strict=True):
                colour = 255 * np.array(colours[int(row[5]) % len(colours)])
                picture[mask] = (0.6 * picture[mask] + 0.4 * colour).astype(np.uint8)
        axes.imshow(picture)
        classes = annotated.objects.classes[annotated.objects.of(number)]
        for corners, label in zip(annotated.objects.outlines(number), classes.tolist(), strict=True):
            colour = colours[label % len(colours)]
            axes.add_patch(Polygon(corners, fill=False, linestyle=":", linewidth=1, edgecolor=colour))
            seen.add(label)
        for row in detections:
            *outline, score, label = row[: numbers + 2].tolist()
            corners = np.array(outline)[_BOX if numbers == 4 else slice(None)].reshape(4, 2)
            colour = colours[int(label) % len(colours)]
            axes.add_patch(Polygon(corners, fill=False, linewidth=1.5, edgecolor=colour))
            left, top = corners[corners[:, 1].argmin()]
            axes.text(left, top, f"{score:.2f}", fontsize=6, color="white", backgroundcolor=(*colour, 0.7), va="bottom")
            seen.add(int(label))
        axes.set_axis_off()
    for axes in frames:  # those left over, in the last row
        axes.remove()
    lines = [Line2D([], [], color=colours[label % len(colours)]) for label in sorted(seen)]
    names = [annotated.class_names[label].replace("$", r"\$") for label in sorted(seen)]
    figure.legend(lines, names, loc="outside upper center", ncols=min(8, max(1, len(names))), fontsize=8)
    figure.supxlabel(f"{about}dotted: annotated; lines: found, with a score of {LEAST} and more", fontsize=8)
    return figure
