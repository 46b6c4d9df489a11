"""Figures from records. A method has the same colour in every figure (Okabe-Ito, safe for colour-blind readers)."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from flora.results.tables import grouped, mean_std

COLOURS = {
    "flora": "#D55E00",
    "lora": "#0072B2",
    "linear_probe": "#999999",
    "full": "#000000",
}
MARKERS = {"flora": "o", "lora": "s", "linear_probe": "^", "full": "D"}


def accuracy_against_parameters(title: str, records: list[dict[str, Any]], path: Path) -> None:
    """Test metric against trained parameters (head included), one point per method, bars for the deviation over seeds.

    Args:
        title: the figure's title.
        records: finished records of one dataset and model.
        path: where the PNG goes.
    """
    figure, axes = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
    for (_, _, adapter), group in grouped(records).items():
        mean, std = mean_std([r["value"] for r in group])
        trained = group[0]["trainable_params"] + group[0]["head_params"]
        colour, marker = COLOURS.get(adapter, "#CC79A7"), MARKERS.get(adapter, "v")
        axes.errorbar(trained, mean, yerr=std, color=colour, fmt=marker, markersize=8, capsize=3, label=adapter)
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters (adapter and head)")
    axes.set_ylabel(f"test {records[0]['metric']}")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)
    plt.close(figure)
