"""What full fine-tuning's changes keep under each structure, by kind of layer (scripts/analyze_delta.py)."""

import csv
import hashlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from flora.errors import DataError
from flora.results import escape
from flora.results.looks import style
from flora.results.markdown import DASH, markdown_table
from flora.results.plots import Plot
from flora.results.statistics import mean_std

STRUCTURES = {"tucker": "flora", "flattened": "flora_flat", "shuffled": "flora_shuffled"}
"""The structures, each with the method that has it."""
KINDS = ("convolution", "depthwise", "linear")
_NOTES = (
    "energy: share of the squared norm of a layer's change that the best form with FLoRA's ranks (tucker), the best"
    " matrix of as many parameters (flattened), and the best form after the kernel's positions are shuffled keep",
    "mean over the layers of a kind, then mean ± sample standard deviation over runs of adapter=full; linear: 1x1"
    " convolutions too; a dash: kernels of one position have nothing to shuffle",
)


@dataclass(frozen=True)
class Kept:
    """Means over the layers of one kind in one run: share kept by structure, None where it does not apply."""

    model: str
    dataset: str
    kind: str
    ranks: str
    layers: int
    shares: dict[str, float | None]


def kind_of(shape: Sequence[int]) -> str:
    """The kind of a layer by its weight ``[out, in, k...]``."""
    if all(size == 1 for size in shape[2:]):
        return "linear"
    return "depthwise" if shape[1] == 1 else "convolution"


def read(folder: Path) -> list[Kept]:
    """What was measured of each run; DataError where a file is not what analyze_delta.py writes."""
    found = []
    for path in sorted(folder.glob("delta_*.csv")):
        try:
            lines = list(csv.DictReader(path.read_text().splitlines()))
            kinds: dict[str, list[dict[str, str]]] = {}
            for line in lines:
                kinds.setdefault(kind_of([int(size) for size in line["shape"].split("x")]), []).append(line)
            for kind, of_kind in kinds.items():
                first = of_kind[0]
                ranks = f"r = {int(first['r'])}, kernel rank {int(first['kernel_rank'])}"
                shares = {name: _mean([line[name] for line in of_kind]) for name in STRUCTURES}
                found.append(Kept(first["model"], first["dataset"], kind, ranks, len(of_kind), shares))
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise DataError(f"{path}: not what analyze_delta.py writes ({type(error).__name__}); remove it") from error
    return found


def _mean(texts: Sequence[str]) -> float | None:
    values = [float(text) for text in texts if text]
    return statistics.fmean(values) if values else None


def _groups(measured: Sequence[Kept]) -> dict[tuple[str, str, str], list[Kept]]:
    """Runs by model, kind and ranks, in the order of KINDS."""
    groups: dict[tuple[str, str, str], list[Kept]] = {}
    for kept in sorted(measured, key=lambda kept: (kept.model, kept.ranks, KINDS.index(kept.kind))):
        groups.setdefault((kept.model, kept.kind, kept.ranks), []).append(kept)
    return groups


def over_runs(runs: Sequence[Kept], structure: str) -> tuple[float, float | None] | None:
    """Mean and deviation over runs of the share that a structure keeps; None where it does not apply."""
    values = [share for kept in runs if (share := kept.shares[structure]) is not None]
    return mean_std(values) if values else None


def markdown(measured: Sequence[Kept]) -> str:
    """The table: a line for each model, kind of layer and ranks."""
    body = []
    for (model, kind, ranks), runs in _groups(measured).items():
        shown = [_shown(over_runs(runs, structure)) for structure in STRUCTURES]
        pairs = [(kept.shares["tucker"], kept.shares["flattened"]) for kept in runs]
        gains = [tucker - flat for tucker, flat in pairs if tucker is not None and flat is not None]
        sets = ", ".join(sorted({kept.dataset for kept in runs}))
        last = _shown(mean_std(gains) if gains else None, "+.4f")
        body.append([model, kind, ranks, str(runs[0].layers), str(len(runs)), sets, *shown, last])
    head = ["model", "layers", "ranks", "number", "runs", "data sets", *STRUCTURES, "tucker - flattened"]
    lines = ["# What full fine-tuning changes: energy kept at equal parameters", "", *markdown_table(head, body), ""]
    return "\n".join([*lines, *(f"- {escape.markdown(note)}" for note in _NOTES)]) + "\n"


def _shown(value: tuple[float, float | None] | None, spec: str = ".4f") -> str:
    if value is None:
        return DASH
    return format(value[0], spec) + (f" ± {value[1]:.4f}" if value[1] is not None else "")


def plot(measured: Sequence[Kept]) -> Plot:
    """The figure of the energies."""
    digest = hashlib.sha256(repr((1, measured)).encode()).hexdigest()
    return Plot("energy", "", "", "", digest, lambda: figure(measured))


def figure(measured: Sequence[Kept]) -> Figure:
    """Bars of the energy kept, by model and kind of layer, with the deviation over runs."""
    groups = _groups(measured)
    drawn, axes = plt.subplots(figsize=(1.6 + 1.1 * len(groups), 3.2), layout="constrained")
    for at, (structure, method) in enumerate(STRUCTURES.items()):
        places, heights, bars = [], [], []
        for place, runs in enumerate(groups.values()):
            value: Any = over_runs(runs, structure)
            if value is not None:
                places.append(place + 0.27 * (at - 1))
                heights.append(value[0])
                bars.append(value[1] or 0.0)
        axes.bar(places, heights, 0.25, yerr=bars, color=style(method)[0], label=structure, capsize=2)
    names = [escape.label(f"{model}\n{kind}") for model, kind, _ in groups]
    axes.set_xticks(range(len(groups)), names, fontsize=8)
    axes.set_ylabel("share of the change's squared norm")
    axes.set_title("Energy of full fine-tuning's changes kept at equal parameters", fontsize=8)
    axes.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    return drawn
