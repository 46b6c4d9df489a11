"""Render tables and figures from records: `python scripts/make_tables.py [TABLE] [--scale mini] [--check]`."""

import argparse
import sys
from pathlib import Path

from flora.config import main
from flora.errors import DataError
from flora.results import benchmarks
from flora.results.counts import claims_markdown
from flora.results.experiments import Table, load, names, scales
from flora.results.plots import Plot, plots, written_hash
from flora.results.store import Contents, Store
from flora.results.tables import as_csv, latex, markdown, record_of, rows


def make_tables() -> None:
    """Parse the command line, read the records, then write the files or say which are stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "table", nargs="?", help="name of a file in experiments/, or step_cost; default: all that have records"
    )
    parser.add_argument("--scale", default="mini", help="mini or paper")
    parser.add_argument("--results", type=Path, default=Path("results/measured"), help="folder of the records")
    parser.add_argument("--output", type=Path, default=Path("results"), help="tables/ and figures/ go in here")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when a file is stale")
    arguments = parser.parse_args()
    store = Store(arguments.results)
    contents = store.read_all()
    for problem in contents.problems:
        print(f"left out: {problem}", file=sys.stderr)
    texts: dict[Path, str] = {}
    figures: dict[Path, Plot] = {}
    if arguments.table == "claims":  # on request only: counting its models takes minutes, and no record changes it
        texts[arguments.output / "tables" / "claims.md"] = claims_markdown()
    elif arguments.table == "step_cost":
        texts |= benchmarks.rendered(arguments.output)
        if not texts:
            raise DataError(f"no result in {arguments.output / 'benchmarks'}: run scripts/bench_step.py --json first")
    else:
        chosen = [load(arguments.table, arguments.scale)] if arguments.table else with_records(contents)
        texts |= {} if arguments.table else benchmarks.rendered(arguments.output)
        if not chosen and not texts:
            raise DataError(f"no finished record of any table in {arguments.results}: run scripts/reproduce.py first")
        for table in chosen:
            more_texts, more_figures = rendered(table, contents, store, arguments.output)
            texts |= more_texts
            figures |= more_figures
    changed = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    redrawn = [path for path, plot in figures.items() if written_hash(path) != plot.hash]
    if arguments.check:
        report_stale([*changed, *redrawn])
        return
    for path in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(texts[path])
    for path in redrawn:
        figures[path].write(path)
    if arguments.table:
        print(next(iter(texts.values())))
    print(*texts, *figures, sep="\n")


def report_stale(paths: list[Path]) -> None:
    """Name stale files on stderr; exit code 1 when there are any."""
    for path in paths:
        print(f"stale: {path}", file=sys.stderr)
    if paths:
        print(f"error: {len(paths)} files are stale: run scripts/make_tables.py", file=sys.stderr)
        sys.exit(1)


def with_records(contents: Contents) -> list[Table]:
    """Every table and scale of which a run is finished."""
    tables = [load(name, scale) for name in names() for scale in scales(name)]
    return [t for t in tables if any(record_of(c, contents) for c in t.cells)]


def rendered(table: Table, contents: Contents, store: Store, output: Path) -> tuple[dict[Path, str], dict[Path, Plot]]:
    """A table's files: texts by path, Markdown first, and figures by path."""
    found = rows(table, contents)
    name = table.name if table.scale == "mini" else f"{table.name}_{table.scale}"
    stem = output / "tables" / name
    texts = {
        stem.with_suffix(".md"): markdown(table.title, found),
        stem.with_suffix(".tex"): latex(table.title, found),
        stem.with_suffix(".csv"): as_csv(found),
    }
    figures = {output / "figures" / name / plot.name: plot for plot in plots(table, found, store.finished)}
    return texts, figures


if __name__ == "__main__":
    main(make_tables, trace=lambda: False)
