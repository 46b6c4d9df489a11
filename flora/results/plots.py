"""Figures from records. A method looks the same everywhere, in colours safe for colour-blind readers (Okabe-Ito)."""

import hashlib
import io
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flora.errors import ConfigError
from flora.results.cells import Table
from flora.results.escape import file_name
from flora.results.escape import label as shown_as
from flora.results.rows import Row, digest
from flora.results.statistics import mean_std

STYLES = {
    "flora": ("#D55E00", "o"),
    "lora": ("#0072B2", "s"),
    "dora": ("#009E73", "P"),
    "full": ("#000000", "D"),
    "linear_probe": ("#999999", "^"),
    "bitfit": ("#E69F00", "v"),
    "adalora": ("#56B4E9", "<"),
    "houlsby": ("#CC79A7", ">"),
    "flora_flat": ("#F0A070", "X"),
    "flora_shuffled": ("#A04000", "*"),
    "flora_nocore": ("#E8C468", "h"),
    "flora_kernelfree": ("#7A5230", "p"),
}
OTHER = ("#CC79A7", "d")
SIZE, DPI, HASH = (5.6, 3.6), 200, "flora data"
PALETTE = 256  # colours of a written figure: half the bytes, and each method keeps its own
_VERSION = 3  # bumped when figures of the same data look different


@dataclass(frozen=True)
class Plot:
    """A figure that can be drawn.

    Attributes:
        kind, task, model: what it shows; no task where it shows several.
        hash: of the data in it.
        draw: how to draw it.
    """

    kind: str
    task: str
    model: str
    hash: str
    draw: Callable[[], Figure]

    @property
    def name(self) -> str:
        """Its file's name."""
        return file_name(self.kind, self.task, self.model) + ".png"

    def write(self, path: Path) -> None:
        """Draw to a PNG that carries the hash."""
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = io.BytesIO()
        with plt.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False}):
            figure = self.draw()
        figure.savefig(drawn, format="png", dpi=DPI)
        plt.close(figure)
        facts = PngInfo()
        facts.add_text(HASH, self.hash)
        with Image.open(drawn) as image:
            few = image.convert("RGB").quantize(PALETTE, dither=Image.Dither.NONE)
        few.save(path, pnginfo=facts, optimize=True)


def written_hash(path: Path) -> str | None:
    """The hash that a written figure carries; None where there is no such figure."""
    try:
        with Image.open(path) as image:
            return image.info.get(HASH)
    except OSError:
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
        per_model = kind == "radar"
        for key in dict.fromkeys(("", r.model) if per_model else (r.task, r.model) for r in measured):
            chosen = [row for row in measured if row.model == key[1] and key[0] in ("", row.task)]
            if not _USABLE[kind](chosen):
                continue
            title = ", ".join(part for part in key if part) + "\n" + textwrap.fill(table.title, 84)
            records = [record for row in chosen for record in row.records.values()]
            content = json.dumps([_VERSION, kind, title, digest(records)])
            draw = _drawing(kind, shown_as(title), chosen, whole)
            yield Plot(kind, *key, hashlib.sha256(content.encode()).hexdigest(), draw)


def _drawing(kind: str, title: str, rows: list[Row], whole: Callable[[str], Any]) -> Callable[[], Figure]:
    return lambda: _KINDS[kind](title, rows, whole)


def pareto(title: str, rows: list[Row], whole: Any) -> Figure:
    """Metric against trained parameters (head included), bars for the deviation over seeds, a line along the front."""
    figure, axes = _axes(title, "trained parameters (adapter and head)", _metric(rows))
    points = []
    for row in rows:
        mean, std = mean_std(row.values)
        trained = row.first["trainable_params"] + row.first["head_params"]
        points.append((trained, mean))
        colour, marker = style(row.method)
        axes.errorbar(
            trained, mean, yerr=std, color=colour, fmt=marker, markersize=7, capsize=3, label=shown_as(row.name)
        )
    axes.plot(*zip(*front(points), strict=True), color="#666666", linewidth=0.8, linestyle=":", zorder=0)
    axes.set_xscale("log")
    _legend(axes)
    return figure


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other beats with as few parameters or fewer, by parameters."""
    best: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best


def rank(title: str, rows: list[Row], whole: Any) -> Figure:
    """Metric against rank, one line a method, bands for the deviation over seeds."""
    figure, axes = _axes(title, "rank r", _metric(rows))
    for method in dict.fromkeys(row.method for row in rows):
        points = sorted((r, *mean_std(row.values)) for row in rows if row.method == method if (r := _rank(row)))
        if points:
            x, mean = [p[0] for p in points], np.array([p[1] for p in points])
            _line(axes, x, mean, np.array([p[2] or 0.0 for p in points]), method, method)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    _legend(axes)
    return figure


def curves(title: str, rows: list[Row], whole: Callable[[str], Any]) -> Figure:
    """Training loss against step, mean and deviation over seeds."""
    return _over_steps(title, rows, whole, [("loss", "training loss")])


def norms(title: str, rows: list[Row], whole: Callable[[str], Any]) -> Figure:
    """Norm of the change and its amplification factor against step (Figure 4 of the paper)."""
    shown = [("delta_norm", "mean norm of the change, Frobenius"), ("amplification", "mean amplification factor")]
    return _over_steps(title, rows, whole, shown)


def radar(title: str, rows: list[Row], whole: Any) -> Figure:
    """One axis a data set, from the lowest mean of the methods (inner ring) to the highest (outer ring)."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    means = {(row.name, row.task): mean_std(row.values)[0] for row in rows}
    angles = np.linspace(0, 2 * math.pi, len(tasks), endpoint=False)
    figure = plt.figure(figsize=(5.6, 4.6), layout="constrained")
    axes: Any = figure.add_subplot(projection="polar")
    lows = [min(v for (_, task), v in means.items() if task == t) for t in tasks]
    highs = [max(v for (_, task), v in means.items() if task == t) for t in tasks]
    for row in {row.name: row for row in rows}.values():
        values = [means.get((row.name, task), math.nan) for task in tasks]
        scaled = [
            0.3 + 0.7 * ((v - lo) / (hi - lo) if hi > lo else 1.0)
            for v, lo, hi in zip(values, lows, highs, strict=True)
        ]
        colour, marker = style(row.method)
        axes.plot(
            [*angles, angles[0]],
            [*scaled, scaled[0]],
            color=colour,
            marker=marker,
            markersize=4,
            label=shown_as(row.name),
        )
    labels = [f"{shown_as(t)}\n{lo:.3f} to {hi:.3f}" for t, lo, hi in zip(tasks, lows, highs, strict=True)]
    axes.set_xticks(angles, labels, fontsize=8)
    axes.set_ylim(0, 1.05)
    axes.set_yticks([0.3, 1.0], ["lowest", "highest"], fontsize=6)
    figure.suptitle(f"{_metric(rows)}, {title}", fontsize=8)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.05, 1.0))
    return figure


def cost(title: str, rows: list[Row], whole: Any) -> Figure:
    """Training time and peak memory as multiples of LoRA's."""
    figure, pair = plt.subplots(1, 2, figsize=(6.4, 0.8 + 0.35 * len(rows)), layout="constrained", sharey=True)
    shown = [("train_seconds", "training time / LoRA's"), ("peak_memory_bytes", "peak memory / LoRA's")]
    for axes, (key, label) in zip(pair, shown, strict=True):
        values = [row.relative(key) or math.nan for row in rows]
        bars = axes.barh([shown_as(row.name) for row in rows], values, color=[style(row.method)[0] for row in rows])
        axes.bar_label(bars, [f"{v:.2f}" for v in values], padding=2, fontsize=8)
        axes.margins(x=0.15)
        axes.axvline(1, color="#666666", linewidth=0.8, linestyle=":")
        axes.set_xlabel(label)
    pair[0].invert_yaxis()
    figure.suptitle(title, fontsize=8)
    return figure


def style(method: str) -> tuple[str, str]:
    """A method's colour and marker; a flattened rival looks like the method."""
    return STYLES.get(method) or STYLES.get(method.removesuffix("_flat")) or OTHER


def _over_steps(title: str, rows: list[Row], whole: Callable[[str], Any], shown: list[tuple[str, str]]) -> Figure:
    figure, many = plt.subplots(
        1, len(shown), figsize=(SIZE[0] * (1 if len(shown) == 1 else 1.5), SIZE[1]), layout="constrained", squeeze=False
    )
    for axes, (name, label) in zip(many[0], shown, strict=True):
        for row in rows:
            histories = [whole(record["run_id"])["history"] for record in row.records.values()]
            series = [{e["step"]: e[name] for e in history if name in e and "step" in e} for history in histories]
            steps = sorted(set.intersection(*(set(s) for s in series)))
            if steps:
                values = np.array([[s[step] for step in steps] for s in series])
                std = values.std(0, ddof=1) if len(series) > 1 else np.zeros(len(steps))
                _line(axes, steps, values.mean(0), std, row.method, row.name, markers=False)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(label)
    figure.suptitle(title, fontsize=8)
    _legend(many[0][-1])
    return figure


def _line(axes: Any, x: Any, mean: Any, std: Any, method: str, label: str, markers: bool = True) -> None:
    colour, marker = style(method)
    axes.plot(
        x, mean, color=colour, marker=marker if markers else None, markersize=5, linewidth=1.4, label=shown_as(label)
    )
    axes.fill_between(x, mean - std, mean + std, color=colour, alpha=0.18, linewidth=0)


def _axes(title: str, x: str, y: str) -> tuple[Figure, Any]:
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=8)
    return figure, axes


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7)


def _metric(rows: list[Row]) -> str:
    return shown_as("test " + ", ".join(sorted({row.first["metric"] for row in rows})))


def _rank(row: Row) -> int | None:
    match = re.search(r"(?:^|, )r=(\d+)", row.settings)
    return int(match[1]) if match else None


_KINDS: dict[str, Callable[[str, list[Row], Any], Figure]] = {
    "pareto": pareto,
    "rank": rank,
    "curves": curves,
    "norms": norms,
    "radar": radar,
    "cost": cost,
}
_USABLE: dict[str, Callable[[list[Row]], bool]] = {
    "pareto": lambda rows: True,
    "rank": lambda rows: any(_rank(row) for row in rows),
    "curves": lambda rows: True,
    "norms": lambda rows: True,
    "radar": lambda rows: len({row.task for row in rows}) > 2,
    "cost": lambda rows: any(row.relative("train_seconds") for row in rows),
}
