"""Render tables, figures and the report page from records: `python scripts/make_tables.py [TABLE] [--check]`."""

import argparse
import re
import sys
from pathlib import Path

from flora.errors import DataError
from flora.launch.entry import main
from flora.results import benchmarks
from flora.results.cells import load, names, scales
from flora.results.counts import claims, read_values
from flora.results.plots import Plot, plots, written_hash
from flora.results.report import Section, address, page
from flora.results.store import Contents, Store
from flora.results.tables import as_csv, compact, latex, markdown, record_of, rows

README_TABLE = re.compile(
    r"(<!-- table (\w+), rendered by scripts/make_tables.py -->\n).*?(<!-- end of table -->)", re.S
)


def make_tables() -> None:
    """Parse the command line, read the records, then write the files or say which are stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "table", nargs="?", help="name of a file in experiments/, or step_cost; default: all that have records"
    )
    parser.add_argument("--scale", default="mini", help="mini or paper")
    parser.add_argument("--results", type=Path, default=Path("results/measured"), help="folder of the records")
    parser.add_argument("--output", type=Path, default=Path("results"), help="tables/ and figures/ go in here")
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit code 1 when a file is stale, of TABLE's where one is named",
    )
    arguments = parser.parse_args()
    store = Store(arguments.results)
    contents = store.read_all()
    for problem in contents.problems:
        print(f"left out: {problem}", file=sys.stderr)

    output, everything = arguments.output, arguments.table is None
    texts: dict[Path, str] = {}
    stale: list[Path] = []
    if everything or arguments.table == "claims":
        counted = claim_texts(output, anew=arguments.table == "claims", check=arguments.check)
        texts |= counted or {}
        stale += [] if counted is not None else [output / "tables" / "claims.md"]
    if everything or arguments.table == "step_cost":
        texts |= benchmarks.rendered(output)
    documents = [text for path, text in texts.items() if path.suffix == ".md"]
    found = [] if arguments.table in ("claims", "step_cost") else sections(arguments, contents, store)
    if arguments.table == "step_cost" and not texts:
        raise DataError(f"no result in {output / 'benchmarks'}: run scripts/bench_step.py --json first")
    if everything and not found and not benchmarks.rendered(output):
        raise DataError(f"no finished record of any table in {arguments.results}: run scripts/reproduce.py first")
    for section in found:
        texts |= table_texts(section, output)
    readme = output.parent / "README.md"
    if everything and readme.exists():
        texts[readme] = README_TABLE.sub(lambda place: embedded(place, contents), readme.read_text())

    figures: dict[Path, Plot] = {path: plot for section in found for path, plot in section.figures.items()}
    redrawn = [path for path, plot in figures.items() if written_hash(path) != plot.hash]
    if not arguments.check:
        for path in redrawn:
            figures[path].write(path)
    if everything and arguments.check and redrawn:
        stale.append(output / "report.html")
    elif everything:  # it holds the figures, so they come first
        where = address(arguments.results, output / "report.html")
        texts[output / "report.html"] = page(found, documents, store.finished, where)
    changed = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    stem = "*" if everything else found[0].table.stem if found else arguments.table
    left = unrendered(output, stem, {*texts, *figures})
    for path in left:
        print(f"stale: {path}: nothing renders it any more, remove it", file=sys.stderr)
    if arguments.check:
        report_stale([*changed, *redrawn, *stale], left)
        return
    for path in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(texts[path])
    if arguments.table:
        print(next(iter(texts.values())))
    print(*texts, *figures, sep="\n")


def unrendered(output: Path, stem: str, rendered: set[Path]) -> list[Path]:
    """Files of the tables ``stem`` that nothing renders any more, as when a last record is gone; nobody removes them.

    Claims are counted on request, and ``delta_*`` is what scripts/analyze_delta.py wrote.
    """
    there = {*(output / "tables").glob(f"{stem}.*"), *(output / "figures").glob(f"{stem}/*.*")}
    return sorted(path for path in there - rendered if not path.name.startswith((".", "claims.", "delta_")))


def report_stale(paths: list[Path], left: list[Path]) -> None:
    """Name stale files on stderr; exit code 1 when there are any, or any ``left`` that nothing renders."""
    for path in paths:
        print(f"stale: {path}", file=sys.stderr)
    if paths or left:
        remedy = "run scripts/make_tables.py" if paths else "remove them"
        print(f"error: {len(paths) + len(left)} files are stale: {remedy}", file=sys.stderr)
        sys.exit(1)


def claim_texts(output: Path, anew: bool, check: bool) -> dict[Path, str] | None:
    """The claims' files; empty until they have been asked for once, None where a check would have to count.

    Counting takes minutes, so what was counted holds as long as the configs that it counted.
    """
    stem = output / "tables" / "claims"
    known = {} if anew else read_values(stem.with_suffix(".csv"))
    if not known and not anew:
        return {}
    found = claims(known, count_missing=anew or not check)
    return None if found is None else {stem.with_suffix(".md"): found.markdown(), stem.with_suffix(".csv"): found.csv()}


def sections(arguments: argparse.Namespace, contents: Contents, store: Store) -> list[Section]:
    """The tables to render, with their lines and figures: the one asked for, or all of which a run is finished."""
    if arguments.table and not arguments.results.is_dir():
        raise DataError(f"no finished record: there is no folder {arguments.results}")
    if arguments.table:
        chosen = [load(arguments.table, arguments.scale)]
    else:
        tables = [load(name, scale) for name in names() for scale in scales(name)]
        chosen = [table for table in tables if any(record_of(cell, contents) for cell in table.cells)]
    found = []
    for table in chosen:
        lines, folder = rows(table, contents), arguments.output / "figures" / table.stem
        figures = {folder / plot.name: plot for plot in plots(table, lines, store.finished)}
        found.append(Section(table, lines, figures))
    return found


def table_texts(section: Section, output: Path) -> dict[Path, str]:
    """A table's files: texts by path, Markdown first."""
    table, title, stem = section.table, section.table.title, output / "tables" / section.table.stem
    return {
        stem.with_suffix(".md"): markdown(title, section.rows, table.definition.get("groups", {}).get(table.scale)),
        stem.with_suffix(".tex"): latex(title, section.rows),
        stem.with_suffix(".csv"): as_csv(section.rows),
    }


def embedded(place: re.Match[str], contents: Contents) -> str:
    """A table of the README, between its markers."""
    table = load(place[2])
    return f"{place[1]}{compact(table, rows(table, contents))}{place[3]}"


if __name__ == "__main__":
    main(make_tables, trace=lambda: False)
