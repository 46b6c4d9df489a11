"""Whether a record can be what it says: its id is that of its config, its other fields agree with it and each other."""

import json
import re
from typing import Any

from flora import config

_MASK = re.compile(r"<(?:secret|\w+)>")  # what flora.secrets puts in a secret's place

# Where the metrics of the suite's tasks lie, by the end of their names: further test sets and kinds of questions go
# before or after. Of a metric that is not among them nothing is known.
_SIGNED = ("matthews_correlation", "pearson", "spearmanr")
_SHARES = ("accuracy", "exact_match", "precision", "recall", "f1", "share")
_ROUNDING = 1e-9
_SAID_TWICE = {  # fields of a record, and where its config says the same
    "mode": ("mode",),
    "seed": ("seed",),
    "task": ("task", "name"),
    "dataset": ("task", "dataset"),
    "adapter": ("adapter", "name"),
    "protocol": ("protocol", "name"),
    "dtype": ("trainer", "dtype"),
    "method_version": ("method_version",),
}


def bounds(metric: str) -> tuple[float, float]:
    """The least and the greatest value of a metric."""
    if metric == "loss" or metric.endswith("_loss"):
        return 0.0, float("inf")
    if metric.endswith(_SIGNED):
        return -1.0, 1.0
    shares = metric.endswith(_SHARES) or metric.startswith("exact_match")
    return (0.0, 1.0) if shares else (-float("inf"), float("inf"))


def contradiction(record: dict[str, Any]) -> str | None:
    """What a record says that cannot be, in one line; None if nothing. Of a run that has not finished: its config."""
    return _of_config(record) or (_of_result(record) if record["status"] == "finished" else None)


def _of_config(record: dict[str, Any]) -> str | None:
    settings = record.get("config") or {}
    try:
        run_id = config.recorded_id(settings)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return "its config is not that of a run"
    masked = record.get("masked") is True and _MASK.search(json.dumps(settings))
    if run_id != record["run_id"] and not masked:  # what a secret was cannot be hashed again
        return f"its config is that of run {run_id}"
    for field, (group, *key) in _SAID_TWICE.items():
        if field == "adapter" and record.get("mode") == "eval":
            continue  # the record names the method that made the checkpoint
        within = settings.get(group)
        expected = within.get(key[0]) if key and isinstance(within, dict) else within
        if expected is not None and record.get(field, expected) != expected:
            return f"{field} is {record[field]!r:.40}, its config says {expected!r:.40}"
    return None


def _of_result(record: dict[str, Any]) -> str | None:
    metrics, metric, value = record.get("metrics") or {}, record["metric"], record["value"]
    if metrics.get(metric) != value:
        return f"value is {value!r:.40}, but its metric {metric} {metrics.get(metric)!r:.40}"
    for name, number in metrics.items():
        low, high = bounds(name)
        if not low - _ROUNDING <= number <= high + _ROUNDING:
            return f"{name} is {number!r:.40}, outside [{low:g}, {high:g}]"
    protocol, trainer = record["config"]["protocol"], record["config"]["trainer"]
    rates = protocol.get("lr_grid") or [trainer.get("lr")]
    if record["mode"] == "train" and record.get("lr") not in rates:
        return f"lr is {record.get('lr')!r:.40}, its config says {rates!r:.80}"
    return None
