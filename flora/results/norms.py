"""How far methods move weights, beside what they reach: curves over steps, and correlations over runs (Figure 4)."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from scipy import stats

from flora.results.looks import SIZE, legend, looks, metric_of
from flora.results.markdown import DASH, formatted, markdown_table
from flora.results.rows import Row
from flora.results.statistics import mean_std

MEASURES = {"delta_norm": "norm of the change", "amplification": "amplification"}
_PAIRS = (("delta_norm", "value"), ("amplification", "value"), ("delta_norm", "amplification"))
_NOTE = (
    "Spearman's rank correlations over runs, with two-sided p; norm and amplification at a run's last look, accuracy on"
    " the test. Runs of one method share its rates and differ in rate and seed, so that those over all methods show"
    " how methods differ, too."
)


def best_rates(rows: Sequence[Row]) -> list[Row]:
    """Of each method's rows the one with the best mean on validation; its only one, where none has looked there."""

    def reached(row: Row) -> float:
        seen = [record["validation"] for record in row.records.values() if "validation" in record]
        return mean_std(seen)[0] if seen else -math.inf

    methods = dict.fromkeys(row.method for row in rows)
    return [max((row for row in rows if row.method == method), key=reached) for method in methods]


def correlation(title: str, rows: list[Row], whole: Any) -> Figure:
    """The metric of each run against the last norm and the last amplification, with Spearman's correlation."""
    figure, pair = plt.subplots(1, 2, figsize=(SIZE[0] * 1.5, SIZE[1]), layout="constrained", sharey=True)
    ways = {name: look | {"linestyle": "none"} for name, look in looks((r.method, r.method) for r in rows).items()}
    for axes, (name, label) in zip(pair, MEASURES.items(), strict=True):
        for method, look in ways.items():
            runs = _runs([row for row in rows if row.method == method], name, "value")
            axes.plot([x for x, _ in runs], [y for _, y in runs], markersize=5, alpha=0.8, **look)
        axes.set_xscale("log")
        axes.set_xlabel(f"mean {label} at the end")
        found = _spearman(_runs(rows, name, "value"))
        axes.set_title(
            "" if found is None else f"Spearman {found[0]:+.2f}, p {found[1]:.2g}, {found[2]} runs", fontsize=8
        )
    pair[0].set_ylabel(metric_of(rows))
    figure.suptitle(title, fontsize=8)
    legend(figure, ways)
    return figure


def usable(rows: list[Row], whole: Any) -> bool:
    """Whether there are runs enough for a correlation."""
    return len(_runs(rows, "delta_norm", "value")) > 3


def correlations_markdown(rows: Sequence[Row]) -> list[str]:
    """A table of correlations of norm, amplification and accuracy, by data set and model, of all runs and by method."""
    body = []
    for task, model in dict.fromkeys((row.task, row.model) for row in rows):
        block = [row for row in rows if (row.task, row.model) == (task, model) and row.records]
        methods = list(dict.fromkeys(row.method for row in block))
        for name in (None, *methods):
            chosen = [row for row in block if name in (None, row.method)]
            found = [_spearman(_runs(chosen, *pair)) for pair in _PAIRS]
            if any(found):
                runs = max(entry[2] for entry in found if entry)
                body.append([task, model, name or "all methods", str(runs), *map(_shown, found)])
    if not body:
        return []
    head = ["task", "model", "runs of", "runs", "norm and accuracy", "amplification and accuracy"]
    return ["", *markdown_table([*head, "norm and amplification"], body), "", _NOTE]


def _shown(found: tuple[float, float, int] | None) -> str:
    return DASH if found is None else f"{found[0]:+.2f} (p = {formatted(found[1], '.2g')})"


def _runs(rows: Sequence[Row], x: str, y: str) -> list[tuple[float, float]]:
    """The pairs of runs that have both, finite and above 0 where they stand on an axis of powers."""
    pairs = [(record.get(x), record.get(y)) for row in rows for record in row.records.values()]
    sound = [(a, b) for a, b in pairs if a is not None and b is not None and math.isfinite(a) and math.isfinite(b)]
    return [(a, b) for a, b in sound if a > 0]


def _spearman(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, int] | None:
    """Correlation, p and number of pairs; None with fewer than four, or where one side does not vary."""
    if len(pairs) < 4 or any(len({pair[side] for pair in pairs}) < 2 for side in (0, 1)):
        return None
    found = stats.spearmanr([a for a, _ in pairs], [b for _, b in pairs])
    return float(found.statistic), float(found.pvalue), len(pairs)
