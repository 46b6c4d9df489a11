"""How figures look: a method's colour and marker everywhere, safe for colour-blind readers (Okabe-Ito)."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from flora.results.escape import label as shown_as
from flora.results.rows import Row

STYLES = {
    "flora": ("#D55E00", "o"),
    "flora_gradient": ("#8A2F00", "H"),
    "lora": ("#0072B2", "s"),
    "lora_plus": ("#00416B", "D"),
    "dora": ("#009E73", "P"),
    "full": ("#000000", "D"),
    "linear_probe": ("#999999", "^"),
    "bitfit": ("#E69F00", "v"),
    "adalora": ("#56B4E9", "<"),
    "lokr": ("#6A51A3", "d"),
    "locon_tucker": ("#B8860B", ">"),
    "houlsby": ("#CC79A7", ">"),
    "flora_flat": ("#F0A070", "X"),
    "flora_shuffled": ("#A04000", "*"),
    "flora_nocore": ("#E8C468", "h"),
    "flora_kernelfree": ("#7A5230", "p"),
}
OTHER = ("#CC79A7", "d")
SIZE = (5.6, 3.6)  # inches; the legend stands below
LOOK: Any = {  # of matplotlib
    **{"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False},
    **{"svg.fonttype": "none", "svg.hashsalt": "flora"},
}
_LINES, _FILLS = ("-", "--", ":", "-."), ("full", "none", "left", "right", "top", "bottom")


def style(method: str) -> tuple[str, str]:
    """A method's colour and marker; a flattened rival looks like the method."""
    return STYLES.get(method) or STYLES.get(method.removesuffix("_flat")) or OTHER


def looks(named: Iterable[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Names of lines, each once, and how they are drawn: their method's colour and marker; settings of one differ.

    Args:
        named: methods, each with the name of a line.
    """
    chosen: dict[str, dict[str, Any]] = {}
    before: dict[tuple[str, str], int] = {}
    for method, name in named:
        if name not in chosen:
            colour, marker = style(method)
            at = before[colour, marker] = before.get((colour, marker), -1) + 1
            line, fill = _LINES[at % len(_LINES)], _FILLS[at % len(_FILLS)]
            chosen[name] = {"color": colour, "marker": marker, "linestyle": line, "fillstyle": fill}
    return chosen


def plain_axes(title: str, x: str, y: str) -> tuple[Figure, Any]:
    """A figure with one pair of axes."""
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=8)
    return figure, axes


def legend(figure: Figure, drawn: dict[str, dict[str, Any]], **other: Any) -> None:
    """What names look like, below a figure, which grows by it; ``other`` replaces what is the same for all."""
    texts = [shown_as(textwrap.fill(name, 44)) for name in drawn]
    columns = min(3 if max(map(len, texts)) < 30 else 2, len(texts))
    handles = [Line2D([], [], markersize=5, **look | other) for look in drawn.values()]
    lines = sum(text.count("\n") + 1 for text in texts) / columns
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.15 * math.ceil(lines) + 0.1)
    figure.legend(handles, texts, loc="outside lower center", ncols=columns, fontsize=7)


def metric_of(rows: Sequence[Row]) -> str:
    """The metric of rows, for an axis."""
    return shown_as("test " + ", ".join(sorted({row.first["metric"] for row in rows})))
