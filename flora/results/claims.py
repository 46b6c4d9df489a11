"""experiments/claims.yaml: claims about how many parameters methods train, computed from the models' sizes."""

import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora.config import cell_id, composed
from flora.results.cells import read_definition
from flora.results.escape import markdown as escaped
from flora.results.markdown import markdown_table

_COLUMNS = ("claim", "assumes", "claimed", "computed", "verdict", "source")


def compute(claim: dict[str, Any]) -> float:
    """The value that a claim of experiments/claims.yaml is about, in its unit: percent or parameters."""
    counted = claim["counted"]
    counted = {"trainable_params": counted} if isinstance(counted, int) else _count(counted)
    adapter = counted["trainable_params"]
    if claim["value"] == "count":
        return float(adapter)
    if claim["value"] == "of_model":
        return 100 * (adapter + counted["head_params"]) / (counted["total_params"] + adapter)
    against = _count(claim["against"])["trainable_params"]
    if claim["value"] == "extra":
        return float(adapter - against)
    share = 100 * adapter / against
    return share if claim["value"] == "share" else 100 - share


@dataclass(frozen=True)
class Claims:
    """experiments/claims.yaml with what was computed.

    Attributes:
        title: the table's title.
        claims: as in the file.
        values: computed, by ``key``. Counting takes minutes, so they are kept; a key changes with what is counted.
    """

    title: str
    claims: list[dict[str, Any]]
    values: dict[str, float]

    def rows(self) -> list[list[str]]:
        """What is claimed, what is computed, whether it holds: one line per claim, in the order of the columns."""
        return [_shown(claim, self.values[key(claim)]) for claim in self.claims]

    def markdown(self) -> str:
        """A Markdown table."""
        note = "Counted from the models' sizes without weights, heads left out (`scripts/count_params.py`)."
        lines = [f"# {escaped(self.title)}", "", *markdown_table(_COLUMNS, self.rows()), "", note]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """The values by key, as `read_values` reads them."""
        lines = [f"{key(claim)},{self.values[key(claim)]!r}" for claim in self.claims]
        return "\n".join(["key,computed", *dict.fromkeys(lines)]) + "\n"


def claims(kept: dict[str, float], count_missing: bool = True) -> Claims | None:
    """Claims with their values: those kept, the others counted; None where one is missing and may not be counted."""
    definition = read_definition("claims")
    values = dict(kept)
    for claim in definition["claims"]:
        if key(claim) not in values:
            if not count_missing:
                return None
            values[key(claim)] = compute(claim)
    return Claims(definition["title"], definition["claims"], values)


def key(claim: dict[str, Any]) -> str:
    """Names what a claim counts: another one when its configs or the method's version change."""
    sides = {name: claim[name] for name in ("counted", "against") if name in claim}
    counted = {name: side if isinstance(side, int) else cell_id(composed(side)) for name, side in sides.items()}
    return hashlib.sha256(json.dumps([claim["value"], counted]).encode()).hexdigest()[:12]


def read_values(path: Path) -> dict[str, float]:
    """What `Claims.csv` wrote, by key; nothing where there is no such file."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {line["key"]: float(line["computed"]) for line in csv.DictReader(file)}


def _shown(claim: dict[str, Any], value: float) -> list[str]:
    unit = "" if claim["value"] in ("count", "extra") else " %"
    verdict = "holds" if abs(value - claim["claimed"]) <= claim["within"] else "does not hold"
    shown = f"{value:,.0f}" if not unit else f"{value:.2f}{unit}"
    claimed = f"{claim['claimed']:,}{unit}"
    return [claim["claim"], claim["assumes"], claimed, shown, verdict, claim["source"]]


def _count(overrides: Sequence[str]) -> dict[str, int]:
    from flora.results.counts import count  # here, as what was counted before needs no torch

    return count(composed(overrides))
