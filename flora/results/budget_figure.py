"""The figure of accuracy against size: one panel a model, one curve a method, means over the data sets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from flora.results.escape import label as shown_as
from flora.results.looks import legend, looks, metric_of
from flora.results.rows import Row
from flora.results.statistics import mean_std

LINES = ("full", "linear_probe")
"""Methods without a size: the top and the bottom."""


@dataclass(frozen=True)
class Point:
    """A size of a method.

    Attributes:
        method: its name.
        share: parameters trained outside the head, in percent of the backbone.
        mean: of the metric, over data sets and seeds.
        std: over seeds of the mean over data sets; None with one seed.
    """

    method: str
    share: float
    mean: float
    std: float | None


def points(rows: Sequence[Row]) -> dict[str, list[Point]]:
    """By model, the sizes of methods that have every data set of the model, with the same seeds; smallest first."""
    found: dict[str, list[Point]] = {}
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model and row.records and not row.chosen]
        tasks = {row.task for row in mine}
        sizes: dict[tuple[str, str], list[Row]] = {}
        for row in mine:
            sizes.setdefault((row.method, row.name), []).append(row)
        made = [
            _point(method, of_size)
            for (method, _), of_size in sizes.items()
            if {row.task for row in of_size} == tasks and len({frozenset(row.records) for row in of_size}) == 1
        ]
        found[model] = sorted(made, key=lambda point: point.share)
    return found


def _point(method: str, rows: Sequence[Row]) -> Point:
    """Rows of one size, one a data set, with the same seeds."""
    records = [record for row in rows for record in row.records.values()]
    shares = [100 * r["trainable_params"] / (r["total_params"] - r["head_params"]) for r in records]
    of_seed = [mean_std([row.records[seed]["value"] for row in rows])[0] for seed in rows[0].records]
    return Point(method, mean_std(shares)[0], *mean_std(of_seed))


def usable(rows: list[Row], whole: Any) -> bool:
    """Whether some method has two sizes on some model."""
    return any(
        len([p for p in of_model if p.method == method]) > 1
        for of_model in points(rows).values()
        for method in {p.method for p in of_model}
    )


def budget(title: str, rows: list[Row], whole: Any) -> Figure:
    """Mean metric against the trained share of the backbone, bars for the deviation over seeds of this mean."""
    every = points(rows)
    methods = dict.fromkeys(point.method for of_model in every.values() for point in of_model)
    ways, drawn = looks((method, method) for method in methods), {}
    figure, many = plt.subplots(
        1, len(every), figsize=(4.2 * len(every), 3.6), layout="constrained", squeeze=False, sharey=False
    )
    for axes, (model, of_model) in zip(many[0], every.items(), strict=True):
        for method in methods:
            mine = [point for point in of_model if point.method == method]
            if mine and method in LINES:
                drawn[method] = look = ways[method] | {"marker": None, "linestyle": "--"}
                axes.axhline(mine[-1].mean, linewidth=1.2, color=look["color"], linestyle="--")
            elif mine:
                drawn[method] = look = ways[method]
                xs, ys, bars = [p.share for p in mine], [p.mean for p in mine], [p.std or 0.0 for p in mine]
                axes.errorbar(xs, ys, yerr=bars, markersize=4.5, linewidth=1.4, capsize=2.5, **look)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        shares = [point.share for point in of_model if point.method not in LINES]
        axes.set_xticks([tick for tick in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16) if _within(tick, shares)])
        axes.set_xlabel("trained parameters without head, % of the backbone")
        axes.set_title(shown_as(model), fontsize=8)
    tasks = list(dict.fromkeys(row.task for row in rows))
    many[0][0].set_ylabel(f"{metric_of(rows)}, mean of {len(tasks)} data sets")
    figure.suptitle(title, fontsize=8)
    legend(figure, drawn)
    return figure


def _within(tick: float, shares: Sequence[float]) -> bool:
    return bool(shares) and min(shares) / 1.5 <= tick <= max(shares) * 1.5
