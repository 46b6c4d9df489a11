"""Tables from records: one row per dataset, model and method; mean and deviation over seeds."""

import statistics
from collections.abc import Iterable
from typing import Any

_COLUMNS = (
    "dataset",
    "model",
    "method",
    "test metric",
    "n",
    "lr",
    "adapter params",
    "% of model",
    "train s",
    "examples/s",
    "peak MB",
    "layers skipped",
)


def grouped(records: Iterable[dict[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Finished records by (dataset, model, adapter), in the order in which they come, seeds sorted."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["dataset"], record["model"], record["adapter"]), []).append(record)
    return {key: sorted(group, key=lambda r: r["seed"]) for key, group in groups.items()}


def mean_std(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); no deviation for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def rows(records: Iterable[dict[str, Any]]) -> list[list[str]]:
    """The table's cells as text, one list per group, in the order of the columns."""
    found = []
    for (dataset, model, adapter), group in grouped(records).items():
        mean, std = mean_std([r["value"] for r in group])
        first = group[0]
        rendered = " (re-rendered)" if first["data"].get("source") == "re-rendered" else ""
        params = first["trainable_params"]
        found.append(
            [
                dataset + rendered,
                model,
                adapter,
                f"{first['metric']} {mean:.4f}" + (f" ± {std:.4f}" if std is not None else ""),
                str(len(group)),
                ", ".join(sorted({f"{r['lr']:g}" for r in group})),
                f"{params:,}",
                f"{100 * params / first['total_params']:.2f}",
                f"{statistics.fmean(r['train_seconds'] for r in group):.1f}",
                f"{statistics.fmean(r['examples_per_second'] for r in group):.0f}",
                f"{statistics.fmean(r['peak_memory_bytes'] for r in group) / 1e6:.0f}",
                str(len(first["skipped_layers"])),
            ]
        )
    return found


def markdown(title: str, records: list[dict[str, Any]]) -> str:
    """A Markdown table that ends with where its numbers come from."""
    body = [list(_COLUMNS), ["---"] * len(_COLUMNS), *rows(records)]
    lines = [f"# {title}", "", *("| " + " | ".join(row) + " |" for row in body), "", *_provenance(records)]
    return "\n".join(lines) + "\n"


def _provenance(records: list[dict[str, Any]]) -> list[str]:
    def all_of(key: str) -> str:
        return "; ".join(sorted({str(r[key]) for r in records}))

    packages = sorted({f"{name} {number}" for r in records for name, number in r["versions"].items()})
    dirty = " (some with uncommitted changes)" if any(r["dirty"] for r in records) else ""
    return [
        f"- commit: {all_of('commit')}{dirty}",
        f"- protocol: {all_of('protocol')}; dtype: {all_of('dtype')}; device: {all_of('device')}",
        f"- versions: {', '.join(packages)}",
        "- deviations are sample standard deviations over seeds; adapter params leave the head out",
    ]
