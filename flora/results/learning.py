"""How one run learned, as a picture: its loss and its validation metric over steps."""

from pathlib import Path
from typing import Any


def series(history: list[dict[str, float]], name: str) -> list[tuple[float, float]]:
    """Steps and what was logged there under a name."""
    return [(entry["step"], entry[name]) for entry in history if name in entry and "step" in entry]


def draw_curves(record: dict[str, Any], path: Path) -> bool:
    """Write a picture of a run's training loss and validation metric over steps; False where it logged no two of any.

    Args:
        record: the whole record.
        path: of the picture; its folder is made where there is none.
    """
    from matplotlib.figure import Figure  # takes a second

    from flora.results.escape import label

    history, metric = record.get("history") or [], record.get("metric")
    lines = {"training loss": series(history, "loss"), f"validation {metric}": series(history, f"eval_{metric}")}
    shown = {name: points for name, points in lines.items() if len(points) > 1}
    if not shown:
        return False
    figure = Figure((4.6 * len(shown), 3.4), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        axes.plot(*zip(*points, strict=True), color="#D55E00", marker="o" if len(points) < 30 else None, markersize=3)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(label(name))
        axes.grid(alpha=0.3)
    words = (
        f"{record['dataset']}, {record['model']}, {record['adapter']}, seed {record['seed']}, run {record['run_id']}"
    )
    figure.suptitle(label(words), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return True
