"""What runs reached on validation, for tables that choose (``split: validation``): no test split is looked at there."""

from collections.abc import Callable, Sequence
from typing import Any

from flora.results.learning import series

NOTE = (
    "values are of the validation split, that of the rate chosen on it where a grid was tried: they serve to choose, "
    "flatter whoever tried more, and no test split was looked at for choosing"
)
DEVELOPMENT = ("cifar10", "dtd10", "rsscn7", "mrpc", "stsb")
"""Data sets on whose validation splits FLoRA's defaults were chosen (tables defaults and text_defaults)."""


def on_validation(
    record: dict[str, Any] | None, whole: Callable[[str], dict[str, Any] | None]
) -> dict[str, Any] | None:
    """A summary whose value is that of validation; with ``curve``, the (step, value) pairs of the reported fit's looks.

    Without a grid the value is the last look's, or the best one's, as the protocol selects. None where the run had
    neither: its reported fit trained on validation too.

    Args:
        record: a summary, or None.
        whole: run id to the whole record.
    """
    if record is None:
        return None
    complete, selection = whole(record["run_id"]) or {}, record.get("selection") or {}
    metric = record["metric"]
    curve = series(complete.get("history") or [], f"eval_{metric}")
    if selection:
        value = rates(record).get(f"{selection['chosen']:g}") if selection.get("metric", metric) == metric else None
    else:
        looks = [seen for _, seen in curve]
        best = complete.get("config", {}).get("protocol", {}).get("select") == "best"
        value = (max(looks) if best else looks[-1]) if looks else None
    if value is None:
        return None
    return record | {"value": value, "metric": f"validation {metric}", "split": "validation", "curve": curve}


def with_norms(record: dict[str, Any] | None, whole: Callable[[str], dict[str, Any] | None]) -> dict[str, Any] | None:
    """A summary with its run's last ``delta_norm`` and ``amplification``, and ``validation``, what it reached there.

    Args:
        record: a summary, or None.
        whole: run id to the whole record.
    """
    if record is None:
        return None
    history = (whole(record["run_id"]) or {}).get("history") or []
    last = {name: seen[-1][1] for name in ("delta_norm", "amplification") if (seen := series(history, name))}
    reached = on_validation(record, whole)
    return record | last | ({} if reached is None else {"validation": reached["value"]})


def rates(record: dict[str, Any]) -> dict[str, float | None]:
    """The value on validation at each rate of a grid, None at one that diverged; empty without a grid."""
    return (record.get("selection") or {}).get("values") or {}


def first_reaching(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """The step of the first look at which a value is reached; None where none reaches it."""
    return next((step for step, value in curve if value >= target), None)
