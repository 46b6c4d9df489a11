"""List runs: `python scripts/runs.py [FOLDER] [--task NAME] [--sort value]`; `--curves` and `--page` draw them."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flora.launch.installed  # noqa: F401

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from flora.errors import DataError
from flora.files import ROOT
from flora.launch.entry import main
from flora.results.escape import one_line
from flora.results.markdown import DASH
from flora.results.record import named
from flora.results.store import Contents, Store, read

COLUMNS = (
    *("date", "task", "model", "adapter", "length", "seed", "status", "metric", "value", "params", "time", "outputs"),
    *("run", "record"),
)
_DESCENDING = ("date", "value")
_NUMBERS = ("length", "seed", "value", "params", "time")
_LONGEST = 60  # characters of a setting


def runs() -> None:
    """Parse the command line, read the records, then print them, draw their curves or write their page."""
    places = yaml.safe_load((ROOT / "configs" / "paths" / "default.yaml").read_text())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path(places["results"]),
        help=f"of records; default: {places['results']}",
    )
    parser.add_argument("--sort", choices=COLUMNS, default="date", help="newest and best first, otherwise least first")
    parser.add_argument("--task", help="runs of this task or data set only")
    parser.add_argument(
        "--json", action="store_true", help="a line of JSON a run, with all metrics, instead of a table"
    )
    parser.add_argument("--curves", action="store_true", help="draw loss and validation metric: OUTPUTS/curves.png")
    parser.add_argument("--page", action="store_true", help="write report.html of the folder into report/ beside it")
    arguments = parser.parse_args()
    folder = arguments.folder
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {folder}: a first run of train.py makes it, or name the folder of your records"
        )
    store = Store(folder)
    contents = store.read_all()
    found = [
        run
        for run in listed(store, contents, Path(places["output"]))
        if arguments.task is None or arguments.task in (run["task"], run["dataset"])
    ]
    found.sort(key=lambda run: _order(run, arguments.sort))
    if arguments.json:
        for run in found:
            print(json.dumps(run))
    else:
        print_table(found)
    for problem in contents.problems:
        print(f"broken: {problem}", file=sys.stderr if arguments.json else sys.stdout)
    if arguments.curves:
        draw(found)
    if arguments.page:
        write_page(store, contents, folder.resolve().parent / "report")


def listed(store: Store, contents: Contents, output: Path) -> Iterator[dict[str, Any]]:
    """What is known of each run; of one that is on and has no record yet, its id."""
    for run_id, summary in contents.records.items():
        record = read(store.path(run_id))[0] or summary
        owner = contents.owners.get(run_id)
        alive = owner is not None and owner.alive
        status = "running" if alive else "interrupted" if record["status"] == "running" else record["status"]
        adapter, trainer = ((record.get("config") or {}).get(group) or {} for group in ("adapter", "trainer"))
        ranks = [f"{key}={adapter[key]}" for key in ("r", "budget") if adapter.get(key) is not None]
        saved = Path(record["adapter_path"]).parent if record.get("adapter_path") else output / run_id
        yield {
            "date": owner.facts.get("since") if alive else record.get("finished") or record.get("started"),
            **{key: record.get(key) for key in ("task", "dataset", "model", "seed", "metric", "value", "metrics")},
            "adapter": record["adapter"],
            "ranks": " ".join(ranks),
            "length": _length(trainer),
            "mode": record.get("mode"),
            "set_anew": (record.get("execution") or {}).get("set_anew"),
            "status": status,
            "error": record.get("error"),
            "params": record.get("trainable_params"),
            "head_params": record.get("head_params"),
            "time": record.get("train_seconds"),
            "run": run_id,
            "outputs": str(saved if saved.is_dir() else output / run_id),
            "record": str(store.path(run_id)),
        }
    for run_id, owner in contents.owners.items():
        if run_id not in contents.records and owner.alive:
            about = owner.facts.get("about")
            about = about if isinstance(about, dict) else {}
            yield {
                **{key: about.get(key) for key in ("task", "dataset", "model", "adapter", "seed")},
                **dict.fromkeys(("metric", "value", "params", "time", "length")),
                **{"date": owner.facts.get("since"), "ranks": "", "status": "running", "run": run_id},
                **{"outputs": str(output / run_id), "record": str(store.path(run_id))},
            }


def _length(trainer: dict[str, Any]) -> str | None:
    """How long a run trains, as it was set."""
    if steps := trainer.get("max_steps"):
        return f"{steps} steps"
    return f"{trainer['epochs']:g} epochs" if trainer.get("epochs") else None


def _tested(run: dict[str, Any]) -> str:
    """Of a test of a saved run, that it is one, and what was set anew."""
    if run.get("mode") != "eval":
        return ""
    anew = run.get("set_anew") or {}
    said = [
        f"{key}={value['now']}" if isinstance(value, dict) and "." in key else f"other {key}"
        for key, value in anew.items()
    ]
    return f" (tested again{''.join(f', {word:.{_LONGEST}}' for word in said)})"


def _order(run: dict[str, Any], column: str) -> tuple[bool, Any]:
    """Where a run comes; what has no value comes last."""
    value = run[column]
    if value is None:
        return True, 0
    if column == "date":
        return False, [-ord(letter) for letter in value]
    if column == "length":
        number, unit = value.split()
        return False, (unit, float(number))
    return False, -value if column in _DESCENDING else value


def print_table(found: list[dict[str, Any]]) -> None:
    """Runs on the terminal, the record's path below where it is too narrow; nothing is cut where a file takes it."""
    console = Console()
    table = as_table(found, COLUMNS)
    width = console.measure(table, options=console.options.update_width(10_000)).maximum
    narrow = console.is_terminal and console.width < width
    if not console.is_terminal:
        console = Console(width=width)
    console.print(as_table(found, COLUMNS[:-2]) if narrow else table)
    if narrow and found:
        print(f"records: {Path(found[0]['record']).parent}/RUN.json, RUN being the last part of outputs")
    kinds = [run["status"] for run in found]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    print(f"{len(found)} runs" + (f": {counts}" if counts else ""))


def as_table(found: list[dict[str, Any]], columns: tuple[str, ...]) -> Table:
    """Runs as a table of some columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in _NUMBERS else "left", overflow="fold")
    for run in found:
        task = named(run["task"], run["dataset"]) if run["task"] else None
        shown = run | {
            "date": (run["date"] or "")[:16].replace("T", " "),
            "task": task and task + _tested(run),
            "adapter": " ".join(word for word in (run["adapter"], run["ranks"]) if word),
            "value": None if run["value"] is None else f"{run['value']:.4f}",
            "params": None if run["params"] is None else f"{run['params']:,}",
            "time": None if run["time"] is None else f"{run['time']:.0f} s",
        }
        cells = [DASH if shown[column] in (None, "") else one_line(str(shown[column])) for column in columns]
        table.add_row(*(cell.replace("[", r"\[") for cell in cells))
    return table


def draw(found: list[dict[str, Any]]) -> None:
    """Each finished run's learning curves, into the folder of its outputs; says where, or why not."""
    from flora.results.learning import draw_curves

    for run in found:
        record = read(Path(run["record"]))[0] if run["status"] == "finished" else None
        path = Path(run["outputs"]) / "curves.png"
        if record is not None and draw_curves(record, path):
            print(path)
        else:
            print(f"no curves of run {run['run']}: {run['status']}, no two losses or metrics logged", file=sys.stderr)


def write_page(store: Store, contents: Contents, output: Path) -> None:
    """The page of the folder's runs, with its tables and figures."""
    from flora.results.freshness import PAGE
    from flora.results.render import rendering  # takes seconds to import

    for path, text in rendering(None, "mini", store.folder, contents, output).texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    print(output / PAGE)


if __name__ == "__main__":
    main(runs, trace=lambda: False)
