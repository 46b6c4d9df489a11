"""Figures from records."""

import hashlib
import io
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from flora.errors import ConfigError
from flora.results import budget_figure
from flora.results import norms as norm_figures
from flora.results.cells import Table
from flora.results.escape import file_name
from flora.results.escape import label as shown_as
from flora.results.looks import LOOK, SIZE, legend, looks, metric_of, plain_axes, style
from flora.results.rows import Row, digest
from flora.results.statistics import mean_std
from flora.results.vector import noted, small

_VERSION = 4  # bumped when figures of the same data look different
_NEAR, _APART = 0.03, 0.03  # of an axis: markers nearer than this are set so far apart


@dataclass(frozen=True)
class Plot:
    """A figure that can be drawn.

    Attributes:
        kind, task, model: what it shows; no task where it shows several.
        protocol: of the runs in it; empty where the table has one.
        hash: of the data in it.
        draw: how to draw it.
    """

    kind: str
    task: str
    model: str
    protocol: str
    hash: str
    draw: Callable[[], Figure]

    @property
    def name(self) -> str:
        """Its file's name."""
        return file_name(self.kind, self.task, self.model, self.protocol) + ".svg"

    def write(self, path: Path) -> None:
        """Draw to an SVG that carries the hash."""
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = io.StringIO()
        with plt.rc_context(LOOK):
            figure = self.draw()
            figure.savefig(drawn, format="svg", metadata={"Date": None})
        plt.close(figure)
        path.write_text(small(drawn.getvalue(), self.hash), encoding="utf-8")


def written_hash(path: Path) -> str | None:
    """The hash that a written figure carries; None where there is no such figure."""
    try:
        return noted(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def plots(table: Table, rows: list[Row], whole: Callable[[str], dict[str, Any] | None]) -> Iterator[Plot]:
    """The figures that a table's YAML asks for (``figures``, by default ``pareto``) and its records allow.

    Args:
        table: the table.
        rows: its lines.
        whole: run id to the whole record, read only when a figure of it is drawn.

    Raises:
        ConfigError: the YAML asks for a figure that does not exist.
    """
    measured = [row for row in rows if row.records]
    for kind in table.definition.get("figures", ["pareto"]):
        if kind not in _KINDS:
            raise ConfigError(f"experiments/{table.name}.yaml: no figure {kind!r}: choose among {', '.join(_KINDS)}")
        for key in dict.fromkeys(_place(kind, row) for row in measured):
            chosen = [row for row in measured if _place(kind, row) == key]
            if not _USABLE[kind](chosen, whole):
                continue
            title = ", ".join(part for part in key if part) + "\n" + textwrap.fill(table.title, 78)
            records = [record for row in chosen for record in row.records.values()]
            content = json.dumps([_VERSION, kind, title, digest(records)])
            draw = _drawing(kind, shown_as(title), chosen, whole)
            yield Plot(kind, *key, hashlib.sha256(content.encode()).hexdigest(), draw)


def _place(kind: str, row: Row) -> tuple[str, str, str]:
    """Task, model and protocol of the figure of a kind that a row belongs to; empty where a figure shows several."""
    task, model = kind not in ("radar", "budget"), kind != "budget"
    return row.task if task else "", row.model if model else "", row.protocol


def _drawing(kind: str, title: str, rows: list[Row], whole: Callable[[str], Any]) -> Callable[[], Figure]:
    return lambda: _KINDS[kind](title, rows, whole)


def pareto(title: str, rows: list[Row], whole: Any) -> Figure:
    """Metric against trained parameters (head included), bars for the deviation over seeds, a line along the front.

    Budgets within a decade or so get an even axis. Markers of nearly equal budgets are set apart, and the axis says so.
    """
    figure, axes = plain_axes(title, "trained parameters (adapter and head)", metric_of(rows))
    trained = [row.first["trainable_params"] + row.first["head_params"] for row in rows]
    wide = max(trained) > 20 * max(1, min(trained))
    places = apart([math.log10(max(1, count)) if wide else float(count) for count in trained])
    shown = [10**place if wide else place for place in places]
    points, drawn = [], looks((row.method, row.name) for row in rows)
    for x, row in zip(shown, rows, strict=True):
        mean, std = mean_std(row.values)
        points.append((x, mean))
        axes.errorbar(x, mean, yerr=std, markersize=7, capsize=3, **drawn[row.name] | {"linestyle": "none"})
    axes.plot(*zip(*front(points), strict=True), color="#666666", linewidth=0.8, linestyle=":", zorder=0)
    if wide:
        axes.set_xscale("log")
        axes.minorticks_off()
    else:
        axes.locator_params(axis="x", nbins=6)
    axes.margins(x=0.08)
    axes.xaxis.set_major_formatter(lambda value, _: _count(value))
    if not np.allclose(shown, trained, rtol=1e-9):
        axes.set_xlabel(axes.get_xlabel() + ", equal ones set apart")
    legend(figure, drawn, linestyle="none")
    return figure


def apart(places: Sequence[float]) -> list[float]:
    """Places on an axis, those nearer to each other than a marker's width spread evenly about their mean."""
    span = (max(places) - min(places)) or abs(places[0]) or 1.0
    spread, order = list(places), sorted(range(len(places)), key=places.__getitem__)
    groups = [[order[0]]]
    for index in order[1:]:
        if places[index] - places[groups[-1][-1]] < _NEAR * span:
            groups[-1].append(index)
        else:
            groups.append([index])
    for group in groups:
        middle, step = sum(places[i] for i in group) / len(group), min(_APART, 0.25 / len(group)) * span
        for at, index in enumerate(sorted(group) if len(group) > 1 else []):
            spread[index] = middle + (at - (len(group) - 1) / 2) * step
    return spread


def _count(value: float) -> str:
    """A number of parameters for an axis: 850, 33.2k, 1.67M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other beats with as few parameters or fewer, by parameters."""
    best: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best


def rank(title: str, rows: list[Row], whole: Any) -> Figure:
    """Metric against rank, one line a method, bars for the deviation over seeds; methods stand a little apart."""
    figure, axes = plain_axes(title, "rank r", metric_of(rows))
    methods = list(dict.fromkeys(row.method for row in rows if _rank(row)))
    drawn = looks((method, method) for method in methods)
    for at, method in enumerate(methods):
        points = sorted((r, *mean_std(row.values)) for row in rows if row.method == method if (r := _rank(row)))
        x = [p[0] * 2 ** (0.06 * (at - (len(methods) - 1) / 2)) for p in points]
        bars = [p[2] or 0.0 for p in points]
        axes.errorbar(x, [p[1] for p in points], yerr=bars, markersize=5, linewidth=1.4, capsize=3, **drawn[method])
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({r for row in rows if (r := _rank(row))}))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    legend(figure, drawn)
    return figure


def curves(title: str, rows: list[Row], whole: Callable[[str], Any]) -> Figure:
    """Training loss against step, mean and deviation over seeds."""
    return _over_steps(title, rows, whole, [("loss", "training loss")])


def norms(title: str, rows: list[Row], whole: Callable[[str], Any]) -> Figure:
    """Norm of the change and its amplification against step (the paper's Figure 4), each method at its best rate."""
    shown = [("delta_norm", "mean norm of the change, Frobenius"), ("amplification", "mean amplification factor")]
    return _over_steps(title, norm_figures.best_rates(rows), whole, shown)


def radar(title: str, rows: list[Row], whole: Any) -> Figure:
    """One axis a data set, from the lowest mean of the methods (inner ring) to the highest (outer ring)."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    means = {(row.name, row.task): mean_std(row.values)[0] for row in rows}
    angles = np.linspace(0, 2 * math.pi, len(tasks), endpoint=False)
    figure = plt.figure(figsize=(5.6, 4.6), layout="constrained")
    axes: Any = figure.add_subplot(projection="polar")
    lows = [min(v for (_, task), v in means.items() if task == t) for t in tasks]
    highs = [max(v for (_, task), v in means.items() if task == t) for t in tasks]
    drawn = looks((row.method, row.name) for row in rows)
    for name, look in drawn.items():
        values = [means.get((name, task), math.nan) for task in tasks]
        scaled = [
            0.3 + 0.7 * ((v - lo) / (hi - lo) if hi > lo else 1.0)
            for v, lo, hi in zip(values, lows, highs, strict=True)
        ]
        axes.plot([*angles, angles[0]], [*scaled, scaled[0]], markersize=4, **look)
    axes.set_ylim(0, 1.05)
    axes.set_yticks([0.3, 1.0], ["lowest", "highest"], fontsize=6)
    axes.set_rlabel_position(180 / len(tasks))  # between two axes
    axes.set_xticks(angles, [""] * len(tasks))
    for angle, task, low, high in zip(angles, tasks, lows, highs, strict=True):
        x, y = math.cos(angle), math.sin(angle)
        side = "center" if abs(x) < 0.3 else "left" if x > 0 else "right"
        height = "center" if abs(y) < 0.3 else "bottom" if y > 0 else "top"
        text = f"{shown_as(task)}\n{low:.3f} to {high:.3f}"
        axes.text(angle, 1.13, text, ha=side, va=height, fontsize=8)
    figure.suptitle(f"{metric_of(rows)}, {title}", fontsize=8)
    legend(figure, drawn)
    return figure


def cost(title: str, rows: list[Row], whole: Any) -> Figure:
    """Training time and peak memory as multiples of LoRA's; methods that never ran as LoRA did are named, not drawn."""
    alike = [row for row in rows if row.relative("train_seconds") or row.relative("peak_memory_bytes")]
    figure, pair = plt.subplots(1, 2, figsize=(6.4, 1.0 + 0.35 * len(alike)), layout="constrained", sharey=True)
    shown = [("train_seconds", "training time / LoRA's"), ("peak_memory_bytes", "peak memory / LoRA's")]
    for axes, (key, label) in zip(pair, shown, strict=True):
        values = [row.relative(key) or math.nan for row in alike]
        bars = axes.barh([shown_as(row.name) for row in alike], values, color=[style(row.method)[0] for row in alike])
        axes.bar_label(bars, ["" if math.isnan(v) else f"{v:.2f}" for v in values], padding=2, fontsize=8)
        axes.margins(x=0.2)
        axes.axvline(1, color="#666666", linewidth=0.8, linestyle=":")
        axes.set_xlabel(label)
    pair[0].invert_yaxis()
    others = [row.name for row in rows if row not in alike]
    if others:
        title += shown_as("\n" + textwrap.fill(f"not run as LoRA was: {', '.join(others)}", 84))
    figure.suptitle(title, fontsize=8)
    return figure


def _over_steps(title: str, rows: list[Row], whole: Callable[[str], Any], shown: list[tuple[str, str]]) -> Figure:
    figure, many = plt.subplots(
        1, len(shown), figsize=(SIZE[0] * (1 if len(shown) == 1 else 1.5), SIZE[1]), layout="constrained", squeeze=False
    )
    ways, drawn = looks((row.method, row.name) for row in rows), {}
    for axes, (name, label) in zip(many[0], shown, strict=True):
        for row in rows:
            steps, values = _series(row, whole, name)
            if len(steps) < 2:
                continue
            mean, std = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(len(steps))
            drawn[row.name] = look = ways[row.name] | {"marker": None}
            axes.plot(steps, mean, linewidth=1.4, **look)
            axes.fill_between(steps, mean - std, mean + std, color=look["color"], alpha=0.18, linewidth=0)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(label)
    figure.suptitle(title, fontsize=8)
    legend(figure, drawn)
    return figure


def _series(row: Row, whole: Callable[[str], Any], name: str) -> tuple[list[int], np.ndarray]:
    """Steps that every seed of a line logged, and what it logged there ``[seed, step]``."""
    histories = [(whole(record["run_id"]) or {}).get("history", []) for record in row.records.values()]
    series = [{e["step"]: e[name] for e in history if name in e and "step" in e} for history in histories]
    steps = sorted(set.intersection(*map(set, series)))
    return steps, np.array([[s[step] for step in steps] for s in series])


def _goes_on(name: str) -> Callable[[list[Row], Any], bool]:
    return lambda rows, whole: any(len(_series(row, whole, name)[0]) > 1 for row in rows)


def _rank(row: Row) -> int | None:
    match = re.search(r"(?:^|, )r=(\d+)", row.settings)
    return int(match[1]) if match else None


_KINDS: dict[str, Callable[[str, list[Row], Any], Figure]] = {
    "pareto": pareto,
    "rank": rank,
    "curves": curves,
    "norms": norms,
    "correlation": norm_figures.correlation,
    "budget": budget_figure.budget,
    "radar": radar,
    "cost": cost,
}
_USABLE: dict[str, Callable[[list[Row], Any], bool]] = {  # whether there is more than a point to show
    "pareto": lambda rows, whole: len(rows) > 1,
    "rank": lambda rows, whole: any(
        len({_rank(row) for row in rows if row.method == method} - {None}) > 1 for method in {r.method for r in rows}
    ),
    "curves": _goes_on("loss"),
    "norms": _goes_on("delta_norm"),
    "correlation": norm_figures.usable,
    "budget": budget_figure.usable,
    "radar": lambda rows, whole: len({row.task for row in rows}) > 2 and len({row.name for row in rows}) > 1,
    "cost": lambda rows, whole: sum(bool(row.relative("train_seconds")) for row in rows) > 1,
}
