"""Runs that belong to no table, as the lines of one of their own: what a user has run."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flora.results.cells import Table
from flora.results.rows import Row, set_marks

TABLE = Table("own_runs", "mini", {"title": "Runs of no table", "figures": ["pareto", "curves"]}, [])
_NOT_SETTINGS = ("seed", "method_version")
_DRAW = "task.split_seed"  # which may follow the seed
_LONGEST = 60  # characters of a setting


def own_rows(records: Iterable[dict[str, Any]], whole: Callable[[str], dict[str, Any] | None]) -> list[Row]:
    """Lines of finished records, runs that differ in the seed alone in one; what else differs are its settings.

    Args:
        records: summaries of finished records.
        whole: run id to the whole record.
    """
    alike: dict[tuple[str, str, str, str], list[tuple[dict[str, Any], Any]]] = {}
    for record in sorted(records, key=lambda record: (record["dataset"], record["model"], record["started"])):
        config = (whole(record["run_id"]) or {}).get("config", {})
        settings = {key: value for key, value in _flat(config) if key not in _NOT_SETTINGS}
        drawn = settings.pop(_DRAW, None)
        method = record["adapter"] if record.get("mode") != "eval" else f"{record['adapter']} (tested again)"
        key = (record["dataset"], record["model"], method, json.dumps(settings, sort_keys=True))
        alike.setdefault(key, []).append((record, drawn))
    lines: dict[tuple[str, str, str, str], dict[int, dict[str, Any]]] = {}
    for (dataset, model, method, written), runs in alike.items():
        follows = len(runs) > 1 and all(drawn == record["seed"] for record, drawn in runs)
        for record, drawn in runs:
            settings = json.loads(written) | {_DRAW: "${seed}" if follows else drawn}
            key = (dataset, model, method, json.dumps(settings, sort_keys=True))
            lines.setdefault(key, {})[record["seed"]] = record
    rows = []
    for (dataset, model, method, written), by_seed in lines.items():
        others = [json.loads(key[3]) for key in lines if key[:3] == (dataset, model, method)]
        mine = json.loads(written)
        differing = [k for k in mine if any(other.get(k) != mine[k] for other in others)]
        text = ", ".join(f"{k.removeprefix('adapter.')}={mine[k]}"[:_LONGEST] for k in differing)
        rows.append(Row(dataset, model, method, text, dict(sorted(by_seed.items())), len(by_seed)))
    return set_marks(rows)


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
