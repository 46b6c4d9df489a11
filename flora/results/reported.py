"""Published numbers: CSV files in results/reported, each number with its source, confidence and a note."""

import csv
from dataclasses import dataclass
from typing import Any

from flora.errors import ConfigError
from flora.files import ROOT
from flora.results.cells import Table
from flora.results.escape import file_name


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
    where: dict[str, Any] = table.definition.get("published") or {}
    if not where:
        return {}
    path = ROOT / "results" / "reported" / f"{file_name(str(where.get('file')))}.csv"
    if not path.exists():
        raise ConfigError(f"{table.name}: published.file names {path}, which does not exist")
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    numbers = {}
    for dataset, column in where.get("columns", {}).items():
        of_column = [line for line in lines if line["column"] == column]
        if not of_column:
            raise ConfigError(f"{table.name}: published.columns names {column}, which {path.name} has not")
        for line in of_column:
            value = float(line["value"]) / where["scale"] if line["value"] else None
            key = (line["group"], line["method"], dataset)
            numbers[key] = Published(value, line["params"], line["source"], line["confidence"], line["note"])
    return numbers
