"""Run what is missing of a table: `python scripts/reproduce.py TABLE [--scale mini] [--status] [--dry-run]`."""

import argparse
import shlex
import sys
import time
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from functools import partial, reduce
from pathlib import Path

import flora.launch.installed  # noqa: F401

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flora.errors import AlreadyRunning, ConfigError
from flora.files import saved_weights
from flora.launch.entry import main
from flora.launch.pool import Pool, pool
from flora.launch.room import MOST
from flora.launch.sweep import visible_gpus
from flora.results.cells import Cell, Table, load
from flora.results.store import SHIPPED, Contents, Store

STATES = (
    "finished",
    "to run again",
    "running",
    "ambiguous",
    "failed",
    "interrupted",
    "stale",
    "missing",
    "not runnable yet",
)
POLL = 5.0  # seconds between two looks at a cell that another process runs


def reproduce() -> None:
    """Parse the command line, then list or run the cells."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", help="name of a file in experiments/, without .yaml")
    parser.add_argument("--scale", default="mini", help="mini (data and weights that need no hub) or paper")
    parser.add_argument("--only", action="append", default=[], metavar="KEY=VALUE,...", help="leave out other cells")
    parser.add_argument("--results", type=Path, default=Path("outputs/records"), help="folder that records go to")
    parser.add_argument(
        "--reuse",
        choices=("reference", "own"),
        default="reference",
        help="reference: cells that ship as finished (results/measured) count as such; own: only those of --results",
    )
    parser.add_argument(
        "--jobs",
        type=jobs_of,
        default=1,
        help="cells to run side by side, over the visible GPUs in turn; auto: as many as cores and memory allow",
    )
    parser.add_argument("--status", action="store_true", help="say how each cell stands, and run nothing")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and run nothing")
    parser.add_argument("--retry", action="store_true", help="run failed cells again")
    parser.add_argument(
        "overrides", nargs="*", help="further overrides that do not change results, e.g. paths.data=DIR"
    )
    arguments = parser.parse_intermixed_args()
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ConfigError(f"--jobs {arguments.jobs}: at least 1, or auto")

    table, stores = load(arguments.table, arguments.scale), [Store(arguments.results)]
    if arguments.reuse == "reference" and SHIPPED.resolve() != arguments.results.resolve():
        stores.insert(0, Store(SHIPPED))
    contents = read(stores)
    states = {cell: state(cell, contents) for cell in selected(table, arguments.only)}
    for cell in (c for c, word in states.items() if word == "ambiguous"):
        contents.finished(cell.cell_id)  # says why
    wanted = ("missing", "stale", "interrupted", "running", *(["failed"] if arguments.retry else []))
    left = [cell for cell, word in states.items() if word in wanted]
    check_overrides(left, arguments.overrides)
    first = started_from(table, left)
    again = [c for c in first if state(c, contents) == "finished" and outputs(c, stores) is None]
    states |= dict.fromkeys(again, "to run again")
    overview(table, states, contents, arguments.jobs)
    if arguments.status:
        for cell, word in states.items():
            print(f"{word:12}", cell.not_runnable_yet or name(cell, contents), *cell.overrides)
        return
    extra = [f"paths.results={arguments.results}", *arguments.overrides, *(["retry=true"] if arguments.retry else [])]
    todo = {
        cell: [*named(table, cell), *extra] for cell in sorted([*again, *left], key=lambda c: (c.depth, c not in first))
    }
    for cell in again:
        todo[cell].append("force=true")
    if arguments.dry_run:
        for cell, further in todo.items():
            print(shlex.join(["python", "train.py", *placed(cell, stores), *further]))
        return
    failed = run_all(todo, first, arguments.jobs, stores)
    contents = read(stores)
    stopped = [cell for cell in failed if state(cell, contents) == "interrupted"]
    failed = [cell for cell in failed if cell not in stopped]
    failed += [] if arguments.retry else [cell for cell, word in states.items() if word == "failed"]
    said = []
    for cells, word, next_time in (
        (failed, "failed", "--retry runs them again"),
        (stopped, "interrupted", "the same command goes on with them"),
    ):
        for cell in cells:
            print(f"{word}:", *cell.overrides, file=sys.stderr)
        said += [f"{len(cells)} cells {word} ({next_time})"] if cells else []
    if said:
        print(f"error: {', '.join(said)}", file=sys.stderr)
        sys.exit(1)


def jobs_of(word: str) -> int | None:
    """The number that ``--jobs`` gives; None: auto."""
    return None if word == "auto" else int(word)


def selected(table: Table, only: list[str]) -> list[Cell]:
    """The cells whose settings are among those of each ``KEY=VALUE,...``; a cell that does not set KEY stays.

    Raises:
        ConfigError: no cell of the table has such a setting.
    """
    cells = table.cells
    for words in only:
        key, _, values = words.partition("=")
        there = dict.fromkeys(cell.settings[key] for cell in table.cells if key in cell.settings)
        for value in values.split(","):
            if value not in there:
                choice = f"choose among {', '.join(there)}" if there else "no cell sets it"
                raise ConfigError(f"--only {words}: {table.name} has no {key}={value}: {choice}")
        cells = [cell for cell in cells if key not in cell.settings or cell.settings[key] in values.split(",")]
    return cells


def check_overrides(cells: list[Cell], overrides: list[str]) -> None:
    """Raise ConfigError where overrides would make other runs of the cells, whose records the table would not find."""
    for cell in cells if overrides else []:
        if Cell((*cell.overrides, *overrides)).cell_id != cell.cell_id:
            raise ConfigError(f"{' '.join(overrides)}: would change the result of {' '.join(cell.overrides)}")


def state(cell: Cell, contents: Contents) -> str:
    """How a cell stands: one of STATES."""
    return "not runnable yet" if cell.not_runnable_yet else contents.state(cell.cell_id, cell.older)


def name(cell: Cell, contents: Contents) -> str:
    """The id of a cell's finished run; else of the cell."""
    record = contents.finished(cell.cell_id)
    return cell.cell_id if record is None else record["run_id"]


def read(stores: list[Store]) -> Contents:
    """What the first folder holds, and the second where a cell is not finished in the first."""
    return reduce(Contents.with_own, [store.read_all() for store in stores])


def started_from(table: Table, cells: list[Cell]) -> list[Cell]:
    """The runnable cells that some of ``cells`` start from, and those that these start from, in the table's order.

    A finished one is run again where its outputs are gone: records travel with the repository, outputs do not.
    """
    firsts, ahead = set[Cell](), list(cells)
    while ahead:
        ahead = [first for cell in ahead for _, first in cell.starts_from if first not in firsts]
        firsts.update(ahead)
    return [cell for cell in table.cells if cell in firsts and not cell.not_runnable_yet]


def outputs(cell: Cell, stores: list[Store]) -> Path | None:
    """The folder of a cell's finished run that still has what it trained."""
    for record in (store.read_all().finished(cell.cell_id) for store in stores):
        if record is not None and saved_weights(Path(record["adapter_path"] or "-").parent):
            return Path(record["adapter_path"]).parent
    return None


def placed(cell: Cell, stores: list[Store]) -> list[str]:
    """A cell's overrides, with the folders of the runs that it starts from, which have ids of their own."""
    folders = {f"{key}={cell.settings[key]}": (key, outputs(first, stores)) for key, first in cell.starts_from}
    words = ((word, *folders.get(word, ("", None))) for word in cell.overrides)
    return [word if folder is None else f"{key}={folder}" for word, key, folder in words]


def overview(table: Table, states: dict[Cell, str], contents: Contents, jobs: int | None) -> None:
    """Say on stderr how many cells stand how, what is wrong with which record, and how long the rest will take."""
    counted = Counter(states.values())
    parts = [f"{counted[word]} {word}" for word in STATES if counted[word] and word != "finished"]
    left = seconds_left(states, contents, jobs)
    about = "about" if jobs else "at most about"
    estimate = f"; {about} {timedelta(seconds=round(left))} left" if left else ""
    done = f"{table.name}: {counted['finished']} of {len(states)} cells finished"
    print(", ".join([done, *parts]) + estimate, file=sys.stderr)
    for problem in contents.problems:
        print(f"left out: {problem}", file=sys.stderr)


def seconds_left(states: dict[Cell, str], contents: Contents, jobs: int | None) -> float | None:
    """An estimate from finished cells, the most alike first; None where none has finished or none is left.

    With ``jobs`` None, the most that it may take.
    """
    took: dict[tuple[str, ...], list[float]] = {}
    for cell in (c for c, word in states.items() if word in ("finished", "to run again")):
        record = contents.finished(cell.cell_id)
        assert record is not None
        took_it = datetime.fromisoformat(record["finished"]) - datetime.fromisoformat(record["started"])
        for key in _likeness(cell):
            took.setdefault(key, []).append(took_it.total_seconds())
    left = [c for c, word in states.items() if word not in ("finished", "failed", "ambiguous", "not runnable yet")]
    if not took or not left:
        return None
    alike = [next(took[key] for key in _likeness(cell) if key in took) for cell in left]
    return sum(sum(seconds) / len(seconds) for seconds in alike) / (jobs or 1)


def _likeness(cell: Cell) -> list[tuple[str, ...]]:
    return [(cell.task, cell.model, cell.method), (cell.model, cell.method), (cell.model,), ()]


def named(table: Table, cell: Cell) -> list[str]:
    """Overrides that tell a logger what the run is for; they change no result."""
    label = table.labels[cell].replace('"', "'")
    return [f"table={table.name}", f'cell="{label}"']


def run_all(todo: dict[Cell, list[str]], first: Collection[Cell], jobs: int | None, stores: list[Store]) -> list[Cell]:
    """Run cells in worker processes, GPUs in turn; returns those that failed.

    Args:
        todo: the cells, each with further overrides.
        first: those of them that end before others start, and among them what they start from before them.
        jobs: how many run side by side; None: as many as there is room for.
        stores: of records, the last one of theirs.
    """
    report, codes = Report(len(todo)), dict[Cell, int]()
    threads = ThreadPoolExecutor(jobs or max(1, len(visible_gpus())) * MOST)  # those beyond the workers wait for one
    with report.bar, threads, pool(jobs) as workers:
        stages = [[c for c in todo if c in first and c.depth == depth] for depth in sorted({c.depth for c in first})]
        for cells in (*stages, [c for c in todo if c not in first]):
            ended = threads.map(lambda c: run(c, todo[c], stores, report, workers), cells)
            codes |= dict(zip(cells, ended, strict=True))
    report.close()
    return [cell for cell, code in codes.items() if code]


def run(cell: Cell, extra: list[str], stores: list[Store], report: "Report", workers: Pool) -> int:
    """Run a cell, or wait while another process does; returns the exit code."""
    overrides = placed(cell, stores)
    words = " ".join(overrides)
    begin = partial(report.start, words)
    while True:
        code, said = workers.run([*overrides, *extra], begin)
        if code != AlreadyRunning.exit_code:
            break
        while stores[-1].read_all().state(cell.cell_id) == "running" and not workers.pause(POLL):
            pass
        begin = report.go_on
        extra = [word for word in extra if word != "force=true"]  # what was to be done again has been
    report.end(words, code, said)
    return code


class Report:
    """Plain lines on stderr, one when a cell starts and one when it ends; on a terminal also a bar over the cells."""

    def __init__(self, total: int) -> None:
        self.total, self.started, self.ended, self.began = total, 0, 0, time.monotonic()
        self.console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("cells", total=total)

    def start(self, words: str) -> None:
        """A cell starts."""
        self.started += 1
        self.console.print(f"[{self.started}/{self.total}] python train.py {words}")

    def go_on(self) -> None:
        """A cell starts that has been said to."""

    def end(self, words: str, code: int, stderr: str) -> None:
        """A cell ended; its last line on stderr says how."""
        self.bar.advance(self.task)
        self.ended += 1
        last = (stderr.strip().splitlines() or ["no message"])[-1]
        self.console.print(f"{'failed' if code else 'finished'}: {words}: {last}")

    def close(self) -> None:
        """All cells ended: how many a minute."""
        minutes = (time.monotonic() - self.began) / 60
        if self.ended:
            self.console.print(f"{self.ended} cells in {minutes:.1f} min, {self.ended / minutes:.1f} a minute")


if __name__ == "__main__":
    main(reproduce, trace=lambda: False)
