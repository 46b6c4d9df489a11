"""One page with every table and figure: results/report.html, which needs nothing but itself; it links the records."""

import base64
import hashlib
import json
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from flora.results.cells import Table
from flora.results.escape import plain
from flora.results.markdown import DASH
from flora.results.plots import Plot, style
from flora.results.rows import Row, blocks
from flora.results.statistics import mean_std
from flora.results.tables import COLUMNS, cells_as_text, notes

FILTERS = ("task", "model", "method")
_ALWAYS = (*FILTERS, "ours")


@dataclass(frozen=True)
class Run:
    """A finished run as the page lists it; ``address`` leads to its record."""

    seed: int
    value: float
    lr: float | None
    train_seconds: float | None
    run_id: str
    address: str


@dataclass(frozen=True)
class Line:
    """A line of a table as the page shows it.

    Attributes:
        row: the line.
        cells: its texts by column.
        colour: of its method, everywhere.
        dots, mean: where its seeds and their mean lie, in percent from the lowest to the highest of task and model.
        runs: its finished runs.
        command, config: how to run it, and the config of its first run without the seed.
    """

    row: Row
    cells: dict[str, str]
    colour: str
    dots: list[str]
    mean: str
    runs: list[Run]
    command: str
    config: str


@dataclass(frozen=True)
class Section:
    """A table as the page shows it; the figures' files exist."""

    table: Table
    rows: list[Row]
    figures: dict[Path, Plot]

    @property
    def columns(self) -> list[str]:
        """Columns in which some line has something to show."""
        shown = [dict(zip(COLUMNS, cells_as_text(row), strict=True)) for row in self.rows]
        return [c for c in COLUMNS if c in _ALWAYS or any(line[c] != DASH for line in shown)]

    @property
    def notes(self) -> list[str]:
        """The table's footer."""
        return notes(self.rows)

    @property
    def finished(self) -> int:
        """How many of its runs are finished."""
        return sum(len(row.records) for row in self.rows)

    def lines(
        self, whole: Callable[[str], dict[str, Any] | None], records: Callable[[dict[str, Any]], str]
    ) -> list[Line]:
        """Its lines.

        Args:
            whole: run id to the whole record.
            records: summary to the address of the record.
        """
        return [_line(row, block, whole, records) for block in blocks(self.rows) for row in block]


def _line(
    row: Row, block: list[Row], whole: Callable[[str], dict[str, Any] | None], records: Callable[[dict[str, Any]], str]
) -> Line:
    values = [value for other in block for value in other.values]
    config = (whole(row.first["run_id"]) or {}).get("config", {}) if row.records else {}
    seeds = ",".join(map(str, row.records)) or "0"
    return Line(
        row,
        dict(zip(COLUMNS, cells_as_text(row), strict=True)),
        style(row.method)[0],
        [_place(value, values) for value in row.values],
        _place(mean_std(row.values)[0], values) if row.values else "",
        [_run(seed, record, records) for seed, record in row.records.items()],
        shlex.join(["python", "train.py", "-m", *row.overrides, f"seed={seeds}"]),
        json.dumps({key: value for key, value in config.items() if key != "seed"}, indent=1),
    )


@dataclass(frozen=True)
class Document:
    """A Markdown file of ours as the page shows it: its title, then headings, lists, tables and paragraphs."""

    title: str
    blocks: list[tuple[str, list[Any]]]

    @property
    def name(self) -> str:
        """Names its place on the page."""
        return re.sub(r"\W+", "-", self.title.lower())


def page(
    sections: list[Section],
    documents: list[str],
    whole: Callable[[str], dict[str, Any] | None],
    records: Callable[[dict[str, Any]], str],
) -> str:
    """The page as HTML; what stands in a record, a config or a name is text there, whatever it holds.

    Args:
        sections: the tables.
        documents: further tables, as the Markdown that `make_tables.py` writes.
        whole: run id to the whole record.
        records: summary to the address of the record, relative to the page.
    """
    loader = PackageLoader("flora.results", "page")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["picture"] = _picture
    script, look = (loader.get_source(environment, name)[0] for name in ("page.js", "page.css"))
    rows = [row for section in sections for row in section.rows]
    return environment.get_template("page.html").render(
        sections=[(section, section.lines(whole, records)) for section in sections],
        choices={name: sorted({getattr(row, name) for row in rows}) for name in FILTERS},
        runs=len({record["run_id"] for row in rows for record in row.records.values()}),
        documents=[document(text) for text in documents],
        look=Markup(look),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def document(text: str) -> Document:
    """Markdown as `make_tables.py` writes it: one title, headings, lists, tables, and lines of text."""
    title, *lines = text.splitlines()
    blocks: list[tuple[str, list[Any]]] = []
    kinds = {"#": "heading", "-": "list", "|": "table"}
    before = ""
    for line in lines:
        kind = kinds.get(line[:1], "text") if line else ""
        if kind and (kind != before or kind in ("heading", "text")):
            blocks.append((kind, []))
        if kind == "table":
            blocks[-1][1].append([plain(cell.strip()) for cell in line.strip("|").split(" | ")])
        elif kind:
            blocks[-1][1].append(plain(line.lstrip("#- ")))
        before = kind
    return Document(plain(title.lstrip("# ")), blocks)


def address(place: Path, page: Path) -> str:
    """The address of a file or folder, seen from a page."""
    return quote(Path(os.path.relpath(place.resolve(), page.resolve().parent)).as_posix())


def _run(seed: int, record: dict[str, Any], records: Callable[[dict[str, Any]], str]) -> Run:
    return Run(
        *(seed, record["value"], record.get("lr"), record.get("train_seconds"), record["run_id"]), records(record)
    )


def _place(value: float, values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{100 * (value - low) / (high - low) if high > low else 50:.1f}"


def _picture(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
