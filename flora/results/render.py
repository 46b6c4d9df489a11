"""What records become: texts and figures by path, for one table or for all."""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flora.errors import DataError
from flora.results import benchmarks, energy, own
from flora.results.cells import Table, load, names, scales
from flora.results.claims import claims, read_values
from flora.results.conclusions import complete
from flora.results.freshness import ANSWERS, PAGE, README, README_TABLE, tables_and_figures
from flora.results.means import means_lines, tests_lines
from flora.results.plots import plots, written_hash
from flora.results.report import Section, address, page
from flora.results.rows import Row, record_of, rows
from flora.results.store import Contents
from flora.results.tables import as_csv, compact, latex, markdown

OTHERS = ("claims", "step_cost", "energy")  # tables that are not made of records


@dataclass(frozen=True)
class Rendering:
    """Files as they should be.

    Attributes:
        texts: by path.
        figures: their paths.
        stale: figures and texts that were not made, as that takes long, though what they were made from has changed.
        left: files there that nothing renders any more, as when a last record is gone; nobody removes them.
    """

    texts: dict[Path, str]
    figures: list[Path]
    stale: list[Path]
    left: list[Path]

    @property
    def changed(self) -> list[Path]:
        """Texts that are not on disk as they should be."""
        return [path for path, text in self.texts.items() if not path.exists() or path.read_text() != text]


def rendering(
    table: str | None, scale: str, folder: Path, contents: Contents, output: Path, draw: bool = True
) -> Rendering:
    """The files of a table, or of everything.

    Args:
        table: a file of experiments/, or one of OTHERS; None: everything that has results.
        scale: of the table.
        folder, contents: the records, and where they are looked for first.
        output: the folder of tables/ and figures/.
        draw: write the figures that changed, as the page holds them. Otherwise they are stale, nothing is written or
            counted, and the page is looked at only where there is one.

    Raises:
        DataError: there is nothing to render.
    """
    texts: dict[Path, str] = {}
    uncounted: list[Path] = []
    if table in (None, "claims"):
        counted = _claims(output, anew=table == "claims", count_missing=draw or table == "claims")
        texts |= counted or {}
        uncounted += [] if counted is not None else [output / "tables" / "claims.md"]
    if table in (None, "step_cost"):
        texts |= benchmarks.rendered(output)
    if not texts and table == "step_cost":
        raise DataError(f"no result in {output / 'benchmarks'}: run scripts/bench_step.py --json first")
    energies = energy.read(output / "tables") if table in (None, "energy") else []
    texts |= {output / "tables" / "energy.md": energy.markdown(energies)} if energies else {}
    if not texts and table == "energy":
        raise DataError(f"no delta_*.csv in {output / 'tables'}: run scripts/analyze_delta.py on full runs first")
    documents = [text for path, text in texts.items() if path.suffix == ".md"]
    sections = [] if table in OTHERS else _sections(table, scale, folder, contents, output)
    for section in sections:
        texts |= _texts(section, output)
    if table is None:
        sections += _own(sections, contents, output)
    if table is None and not sections and not benchmarks.rendered(output):
        raise DataError(f"no finished record in {folder}: run train.py or scripts/reproduce.py first")
    figures = {path: plot for section in sections for path, plot in section.figures.items()}
    if energies:
        plot = energy.plot(energies)
        figures[output / "figures" / "energy" / plot.name] = plot
    outdated = [path for path, plot in figures.items() if written_hash(path) != plot.hash]
    for path in outdated if draw else []:
        figures[path].write(path)
    stale = [*outdated, *uncounted] if not draw else []
    if table is None:
        answers, whole = output / ANSWERS, output / PAGE
        for readme in (output.parent / Path(README).name, answers):
            if readme.exists():
                linked = (output / "tables").relative_to(readme.parent).as_posix()
                embedded = partial(_embedded, contents=contents, folder=linked)
                texts[readme] = README_TABLE.sub(embedded, readme.read_text())
        if stale and whole.exists():
            stale.append(whole)
        elif draw or whole.exists():
            texts[whole] = page(
                sections, documents, lambda record: address(Path(record["path"]), whole), texts.get(answers)
            )
    stem = "*" if table is None else sections[0].table.stem if sections else table
    there = {path for path in tables_and_figures(output, stem) if not path.name.startswith("claims.")}
    return Rendering(texts, list(figures), stale, sorted(there - {*texts, *figures}))


def _claims(output: Path, anew: bool, count_missing: bool) -> dict[Path, str] | None:
    """The claims' files; empty until they have been asked for once, None where they would have to be counted.

    Counting takes minutes, so what was counted holds as long as the configs that it counted.
    """
    stem = output / "tables" / "claims"
    kept = {} if anew else read_values(stem.with_suffix(".csv"))
    if not kept and not anew:
        return {}
    table = claims(kept, count_missing)
    return None if table is None else {stem.with_suffix(".md"): table.markdown(), stem.with_suffix(".csv"): table.csv()}


def _sections(table: str | None, scale: str, folder: Path, contents: Contents, output: Path) -> list[Section]:
    """The tables to render, with their rows and figures: the one asked for, or all of which a run is finished."""
    if table and not folder.is_dir() and not contents.records:
        raise DataError(f"no finished record: there is no folder {folder}")
    if table:
        tables = [load(table, scale)]
    else:
        every = (load(name, scale) for name in names() for scale in scales(name))
        tables = [table for table in every if any(record_of(cell, contents) for cell in table.cells)]
    sections = []
    for chosen in tables:
        sections.append(_section(chosen, rows(chosen, contents), contents, output))
    return sections


def _section(table: Table, lines: list[Row], contents: Contents, output: Path) -> Section:
    folder = output / "figures" / table.stem
    return Section(table, lines, {folder / plot.name: plot for plot in plots(table, lines, contents.whole)})


def _own(sections: list[Section], contents: Contents, output: Path) -> list[Section]:
    """What was run beside the tables, as a section; none where nothing was."""
    shown = {record["run_id"] for section in sections for row in section.rows for record in row.records.values()}
    others = [r for run_id, r in contents.records.items() if r["status"] == "finished" and run_id not in shown]
    return [_section(own.TABLE, own.own_rows(others, contents.whole), contents, output)] if others else []


def _texts(section: Section, output: Path) -> dict[Path, str]:
    """A table's files, Markdown first."""
    stem = output / "tables" / section.table.stem
    return {
        stem.with_suffix(".md"): markdown(section.table, section.rows),
        stem.with_suffix(".tex"): latex(section.table, section.rows),
        stem.with_suffix(".csv"): as_csv(section.rows),
    }


def _embedded(place: re.Match[str], contents: Contents, folder: str) -> str:
    """What stands in a README between its markers; of an unfinished table's means and tests, how far it is."""
    table = load(place[3])
    lines = rows(table, contents)
    if place[2] == "table" and any(row.records for row in lines):
        return f"{place[1]}{compact(table, lines, folder)}{place[4]}"
    if not complete(table, lines):
        done = sum(len(row.records) for row in lines if not row.chosen)
        return f"{place[1]}No answer yet: {done} of {len(table.cells)} runs are finished.\n{place[4]}"
    text = means_lines(table, lines) if place[2] == "means" else tests_lines(table, lines)
    return "\n".join([place[1].rstrip("\n"), *text, place[4]])
