"""Render tables, figures and the report page from records: `python scripts/make_tables.py [TABLE] [--check]`."""

import argparse
import sys
from functools import reduce
from pathlib import Path

import flora.launch.installed  # noqa: F401

from flora.launch.entry import main
from flora.results import freshness

SHIPPED, OWN = Path("results/measured"), Path("outputs/rendered")


def make_tables() -> None:
    """Parse the command line, read the records, then write the files or say which are stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "table",
        nargs="?",
        help="name of a file in experiments/, or step_cost or energy; default: all that have records",
    )
    parser.add_argument("--scale", default="mini", help="mini or paper")
    parser.add_argument(
        "--results",
        type=Path,
        action="append",
        metavar="DIR",
        help=f"folder of records; of several, the first that has a cell finished gives it (default: {SHIPPED})",
    )
    parser.add_argument(
        "--output", type=Path, help=f"tables/ and figures/ go in here (default: results, with --results {OWN})"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit code 1 when a file is stale, of TABLE's where one is named",
    )
    arguments = parser.parse_args()
    table, results = arguments.table, arguments.results or [SHIPPED]
    output = arguments.output or (Path("results") if results == [SHIPPED] else OWN)
    stem = table if table is None or arguments.scale == "mini" else f"{table}_{arguments.scale}"
    # Claims that are asked for by name are counted anew, and the code that counts is not among the inputs.
    if arguments.check and table != "claims" and freshness.fresh(stem, results, output):
        return
    from flora.results.render import rendering  # here, as it takes seconds to import what draws
    from flora.results.store import Contents, Store

    made_from = freshness.inputs(results, output)
    contents = reduce(Contents.with_own, [Store(folder).read_all() for folder in results])
    files = rendering(table, arguments.scale, results[0], contents, output, draw=not arguments.check)
    for problem in contents.problems:
        print(f"left out: {problem}", file=sys.stderr)
    for path in files.left:
        print(f"stale: {path}: nothing renders it any more, remove it", file=sys.stderr)
    changed = files.changed
    if arguments.check:
        report_stale([*changed, *files.stale], files.left)
        if table != "claims":
            print(f"nothing is stale, but {freshness.MANIFEST} did not prove it: render once more", file=sys.stderr)
        return
    for path in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files.texts[path])
    if contents.problems:
        freshness.forget(output)  # a check is to name them again
    else:
        freshness.keep(stem, made_from, [*files.texts, *files.figures], output)
    if table:
        print(next(iter(files.texts.values())))
    print(*files.texts, *files.figures, sep="\n")


def report_stale(paths: list[Path], left: list[Path]) -> None:
    """Name stale files on stderr; exit code 1 when there are any, or any ``left`` that nothing renders."""
    for path in paths:
        print(f"stale: {path}", file=sys.stderr)
    if paths or left:
        remedy = "run scripts/make_tables.py" if paths else "remove them"
        print(f"error: {len(paths) + len(left)} files are stale: {remedy}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main(make_tables, trace=lambda: False)
