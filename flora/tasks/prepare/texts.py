"""Texts that two splits share."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

from flora.tasks.text.rows import Rows


def count(splits: Mapping[str, Rows]) -> dict[str, dict[str, int]]:
    """Rows whose texts occur in two splits, for each pair of splits: ``{"train, validation": {"exact": 2, ...}}``.

    Returns:
        Of the second split of a pair, how many rows have all their texts, letter by letter and in this order, in one
        row of the first (``exact``), and how many of these have a label that no such row has (``other_label``).
    """
    known = {split: _labels(rows) for split, rows in splits.items()}
    shared = {}
    for one, other in combinations(splits, 2):
        rows = list(zip(splits[other].texts, splits[other].labels.tolist(), strict=True))
        found = [(known[one][texts], label) for texts, label in rows if texts in known[one]]
        others = sum(label not in labels for labels, label in found)
        shared[f"{one}, {other}"] = {"exact": len(found), "other_label": others}
    return shared


def _labels(rows: Rows) -> dict[tuple[str, ...], set[float]]:
    labels: dict[tuple[str, ...], set[float]] = {}
    for texts, label in zip(rows.texts, rows.labels.tolist(), strict=True):
        labels.setdefault(texts, set()).add(label)
    return labels
