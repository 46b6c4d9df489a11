"""One page with findings, tables and figures: results/report.html. It needs nothing else, and links the records."""

import base64
import hashlib
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

from flora.results.cells import Table, load, scales
from flora.results.conclusions import Conclusions, complete, conclusions
from flora.results.escape import plain
from flora.results.looks import style
from flora.results.markdown import DASH
from flora.results.notes import markers, notes
from flora.results.plots import Plot
from flora.results.reported import as_printed
from flora.results.rows import Row, blocks, rate_counts
from flora.results.statistics import mean_std
from flora.results.tables import COLUMNS, cells_as_text, dashes

ORDER = (  # of tables: those that answer most first; those that are not named come last
    *("vtab", "budget_curve", "structure_ablation", "ratios", "small_budgets", "table1_convnext", "table2_internvit"),
    *("table3_glue", "table4_llava", "instruct", "commonsense", "table5_cost", "figure1_radar", "figure4_norms"),
    *("classification", "eurosat", "rank_sweep", "kernel_rank_ablation", "defaults", "starts", "text_defaults"),
    *("demo", "own_runs"),
)
FILTERS = ("task", "model", "method")
_LINK = re.compile(r"\[([^\]]+)\]\([^()\s]+\)")  # in Markdown; the page keeps its text
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
        marker: of its footnotes.
        cells: its texts by column.
        colour: of its method, everywhere.
        dots, mean: where its seeds and their mean lie, in percent from the lowest to the highest of its block.
        runs: its finished runs.
        command: how to run it.
    """

    row: Row
    marker: str
    cells: dict[str, str]
    colour: str
    dots: list[str]
    mean: str
    runs: list[Run]
    command: str


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
        return [*notes(self.table, self.rows), *dashes(self.rows)]

    @property
    def published(self) -> tuple[list[str], list[list[str]], list[str]]:
        """What was published for it, of other models: head, rows, notes."""
        return as_printed(self.table)

    @property
    def finished(self) -> int:
        """How many of its runs are finished."""
        return sum(len(row.records) for row in self.rows if not row.chosen)

    @property
    def complete(self) -> bool:
        """Whether no run is missing that can be run."""
        return complete(self.table, self.rows)

    @property
    def conclusions(self) -> Conclusions | None:
        """What it says, as long as no run is missing."""
        return conclusions(self.table, self.rows)

    @property
    def models(self) -> dict[str, str]:
        """What was run: each model, and the name of its weights where that is another."""
        return {row.model: true_name(row.first) for row in self.rows if row.records}

    @property
    def published_models(self) -> list[str]:
        """What the paper ran: the models of the table's other scale."""
        if self.table.scale == "paper" or "paper" not in (scales(self.table.name) if self.table.cells else []):
            return []
        named = {cell.model for cell in load(self.table.name, "paper").cells}
        return sorted(named - self.models.keys())

    def lines(self, records: Callable[[dict[str, Any]], str]) -> list[Line]:
        """Its lines; ``records``: summary to the address of the record."""
        marks = dict(zip(map(id, self.rows), markers(self.rows), strict=True))
        return [_line(row, block, marks[id(row)], records) for block in blocks(self.rows) for row in block]


def true_name(record: dict[str, Any]) -> str:
    """What a record's model is called where its weights come from; "untrained weights" are said."""

    def named(facts: dict[str, Any]) -> str:
        parts = [named(facts[part]) for part in ("vision", "language") if isinstance(facts.get(part), dict)]
        file = Path(str(facts.get("file") or ""))
        source = file.stem if file.suffix == ".gguf" else str(facts.get("package") or "").partition("==")[0]
        name = " + ".join(parts) or str(facts.get("timm_name") or facts.get("hub") or source or "")
        if not parts and facts.get("pretrained") is False:
            name = f"{name or 'a model'}, weights drawn at random"
        return name

    return named(record.get("weights") or {}) or record["model"]


def ordered(sections: list[Section]) -> list[Section]:
    """Tables in their order."""
    place = {name: number for number, name in enumerate(ORDER)}
    return sorted(sections, key=lambda section: place.get(section.table.name, len(ORDER)))


def headline(sections: list[Section]) -> tuple[Path, Plot] | None:
    """The figure that the page opens with: of the complete table with most runs, else of the one with most runs."""
    having = [section for section in sections if section.figures]
    if not having:
        return None
    best = max(having, key=lambda section: (section.complete and bool(section.table.cells), section.finished))
    return min(best.figures.items(), key=lambda figure: figure[1].kind != "radar")


def _line(row: Row, block: list[Row], marker: str, records: Callable[[dict[str, Any]], str]) -> Line:
    values = [value for other in block for value in other.values]
    seeds = ",".join(map(str, row.records)) or "0"
    typed = shlex.join(["python", "train.py", "-m", *row.overrides, f"seed={seeds}"])
    return Line(
        row,
        marker,
        dict(zip(COLUMNS, cells_as_text(row), strict=True)),
        style(row.method)[0],
        [_place(value, values) for value in row.values],
        _place(mean_std(row.values)[0], values) if row.values else "",
        [_run(seed, record, records) for seed, record in row.records.items()],
        typed if row.overrides or not row.records else str(row.first.get("command")),
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
    records: Callable[[dict[str, Any]], str],
    answers: str | None = None,
) -> str:
    """The page as HTML; what stands in a record, a config or a name is text there, whatever it holds.

    Args:
        sections: the tables.
        documents: further tables, as the Markdown that `make_tables.py` writes.
        records: summary to the address of the record, relative to the page.
        answers: what the page opens with, as Markdown; None: with what complete tables say.
    """
    loader = PackageLoader("flora.results", "page")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["picture"] = _picture
    script, look = (loader.get_source(environment, name)[0] for name in ("page.js", "page.css"))
    rows = [row for section in sections for row in section.rows]
    sections = ordered(sections)
    return environment.get_template("page.html").render(
        sections=[(section, section.lines(records)) for section in sections],
        found=[(section, said) for section in sections if (said := section.conclusions)],
        unfinished=[section for section in sections if not section.complete],
        headline=headline(sections),
        choices={name: sorted({getattr(row, name) for row in rows}) for name in FILTERS},
        runs=len({record["run_id"] for row in rows for record in row.records.values()}),
        documents=[document(text) for text in documents],
        answers=None if answers is None else document(_LINK.sub(r"\1", answers)),
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
    for line in (line for line in lines if not line.startswith(("<!--", "```"))):
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
        *(
            seed,
            record["value"],
            record.get("lr") if rate_counts(record) else None,
            record.get("train_seconds"),
            record["run_id"],
        ),
        records(record),
    )


def _place(value: float, values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{100 * (value - low) / (high - low) if high > low else 50:.1f}"


def _picture(path: Path) -> str:
    """A figure's address that is the figure: one SVG, which a browser shows as a picture and runs nothing of."""
    text = path.read_text(encoding="utf-8").strip().replace('"', "'")
    return "data:image/svg+xml," + quote(text, safe=" /:=;,()!*+@?{}|.-'")
