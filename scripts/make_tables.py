"""Render a table and its figure from records: `python scripts/make_tables.py TABLE [--scale mini]`."""

import argparse
import sys
from pathlib import Path

from flora.config import main
from flora.errors import DataError
from flora.results.counts import claims_markdown
from flora.results.experiments import load
from flora.results.plots import accuracy_against_parameters
from flora.results.store import Store
from flora.results.tables import grouped, markdown


def make_tables() -> None:
    """Parse the command line, read the table's records, write Markdown and PNG."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", help="name of a file in experiments/, without .yaml")
    parser.add_argument("--scale", default="mini", help="mini or paper")
    parser.add_argument("--results", type=Path, default=Path("results/measured"), help="folder of the records")
    parser.add_argument("--output", type=Path, default=Path("results"), help="tables/ and figures/ go in here")
    arguments = parser.parse_args()
    if arguments.table == "claims":
        write_table(claims_markdown(), "claims", arguments.output)
        return

    table, store = load(arguments.table, arguments.scale), Store(arguments.results)
    found = [store.finished(cell.run_id) for cell in table.cells if not cell.not_runnable_yet]
    records = [record for record in found if record is not None]
    for problem in store.read_all().problems:
        print(f"left out: {problem}", file=sys.stderr)
    if not records:
        raise DataError(
            f"no finished record of {arguments.table} in {arguments.results}: run scripts/reproduce.py first"
        )
    if len(records) < len(found):
        print(f"{len(found) - len(records)} of {len(found)} cells are missing", file=sys.stderr)
    write_table(markdown(table.title, records), arguments.table, arguments.output)
    for dataset, model in dict.fromkeys((d, m) for d, m, _ in grouped(records)):
        chosen = [r for r in records if (r["dataset"], r["model"]) == (dataset, model)]
        figure = arguments.output / "figures" / arguments.table / f"{dataset}_{model}.png"
        accuracy_against_parameters(table.title, chosen, figure)
        print(f"figure: {figure}")


def write_table(text: str, name: str, output: Path) -> None:
    """Write a table's Markdown, and print it and its path."""
    path = output / "tables" / f"{name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(text)
    print(f"table: {path}")


if __name__ == "__main__":
    main(make_tables, trace=lambda: False)
