"""Run what is missing of a table: `python scripts/reproduce.py TABLE [--scale mini] [--status] [--dry-run]`."""

import argparse
import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flora.config import main
from flora.results.experiments import ROOT, Cell, cells, load
from flora.results.store import Store


def reproduce() -> None:
    """Parse the command line, then list or run the cells."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", help="name of a file in experiments/, without .yaml")
    parser.add_argument("--scale", default="mini", help="mini (data and weights that need no hub) or paper")
    parser.add_argument("--results", type=Path, default=Path("results/measured"), help="folder of the records")
    parser.add_argument("--jobs", type=int, default=1, help="cells to run side by side")
    parser.add_argument("--status", action="store_true", help="say which cells are finished, and run nothing")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and run nothing")
    parser.add_argument(
        "overrides", nargs="*", help="further overrides that do not change results, e.g. paths.data=DIR"
    )
    arguments = parser.parse_intermixed_args()

    store = Store(arguments.results)
    table = cells(load(arguments.table), arguments.scale)
    missing = [cell for cell in table if store.finished(cell.run_id) is None]
    print(f"{arguments.table}: {len(table) - len(missing)} of {len(table)} cells finished", file=sys.stderr)
    if arguments.status:
        for cell in table:
            print("missing " if cell in missing else "finished", cell.run_id, *cell.overrides)
        return
    progress = itertools.count(1)

    def run(cell: Cell) -> bool:
        command = [sys.executable, str(ROOT / "train.py"), *settings(cell, arguments.results, arguments.overrides)]
        print(f"[{next(progress)}/{len(missing)}] python train.py {' '.join(command[2:])}", file=sys.stderr, flush=True)
        return arguments.dry_run or subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0

    with ThreadPoolExecutor(arguments.jobs) as pool:
        failed = [cell for cell, done in zip(missing, pool.map(run, missing), strict=True) if not done]
    if failed:
        print(f"error: {len(failed)} of {len(missing)} cells failed; their messages stand above", file=sys.stderr)
        sys.exit(1)


def settings(cell: Cell, results: Path, extra: list[str]) -> list[str]:
    """The overrides of a cell and where its record goes."""
    return [*cell.overrides, f"paths.results={results}", *extra]


if __name__ == "__main__":
    main(reproduce, trace=lambda: False)
