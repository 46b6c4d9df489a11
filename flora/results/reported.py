"""Published numbers: CSV files in results/reported, each number with its source, confidence and a note."""

import csv
from dataclasses import dataclass
from typing import Any

from flora.errors import ConfigError
from flora.files import ROOT
from flora.results.cells import Table
from flora.results.escape import file_name
from flora.results.markdown import DASH


@dataclass(frozen=True)
class Published:
    """One number as printed: ``value`` in the unit of our metrics; ``params`` as the source words it."""

    value: float | None
    params: str
    source: str
    confidence: str
    note: str


def published(table: Table) -> dict[tuple[str, str, str], Published]:
    """What was published beside a table, by (group, method, data set); empty where its YAML names no file.

    Raises:
        ConfigError: the YAML names a file or a column that does not exist.
    """
    where, lines, path = _read(table)
    numbers = {}
    for dataset, column in where.get("columns", {}).items():
        of_column = [line for line in lines if line["column"] == column]
        if not of_column:
            raise ConfigError(f"{table.name}: published.columns names {column}, which {path} has not")
        for line in of_column:
            value = float(line["value"]) / where["scale"] if line["value"] else None
            key = (line["group"], line["method"], dataset)
            numbers[key] = Published(value, line["params"], line["source"], line["confidence"], line["note"])
    return numbers


def as_printed(table: Table) -> tuple[list[str], list[list[str]], list[str]]:
    """All that was published for a table that runs another model: head, rows as printed, and the notes to them.

    Empty at the scale of the paper, where published numbers stand beside ours, and where nothing was found.
    """
    _, lines, _ = _read(table)
    lines = [line for line in lines if line["value"]]
    if not lines or table.scale == "paper":
        return [], [], []
    columns = list(dict.fromkeys(line["column"] for line in lines))
    body: dict[tuple[str, str, str], dict[str, str]] = {}
    for line in lines:
        key = (line["group"], line["method"], line["params"])
        body.setdefault(key, {})[line["column"]] = line["value"]
    rows = [[*(part or DASH for part in key), *(of.get(name, DASH) for name in columns)] for key, of in body.items()]
    sources = sorted({f"{line['source']} ({line['confidence']})" for line in lines})
    return (
        ["group", "method", "parameters", *columns],
        rows,
        [f"as printed, of the paper's models and data: {'; '.join(sources)}", "a dash: not printed"],
    )


def _read(table: Table) -> tuple[dict[str, Any], list[dict[str, str]], str]:
    """What a table's YAML says of published numbers, the lines of their file, and its name; nothing without any."""
    where: dict[str, Any] = table.definition.get("published") or {}
    if not where:
        return {}, [], ""
    path = ROOT / "results" / "reported" / f"{file_name(str(where.get('file')))}.csv"
    if not path.exists():
        raise ConfigError(f"{table.name}: published.file names {path}, which does not exist")
    with path.open(newline="") as file:
        return where, list(csv.DictReader(file)), path.name
