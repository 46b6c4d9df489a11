"""scripts/runs.py: a user's own records as a table, curves and a page."""

import json
import re
from functools import partial

import pytest
from PIL import Image

from flora.config import recorded_id
from flora.launch.entry import main
from flora.results import Store
from flora.results.cells import load
from scripts.runs import runs
from tests.results.records import write

VALUES = {"flora": 0.91, "lora": 0.93, "full": 0.82}
HISTORY = [{"step": step, "loss": 1 / step, "eval_accuracy": 0.1 * step} for step in (1, 2, 3)]


@pytest.fixture
def listing(sandbox, script):
    """Run runs.py in an empty folder: (exit code, stdout, stderr)."""
    return lambda *arguments: script(partial(main, runs, trace=lambda: False), "runs.py", *arguments)


@pytest.fixture
def store(sandbox):
    store = Store("outputs/records")
    cells = {c.method: c for c in load("eurosat").cells if c.model == "convnext" and c.seed == 0}
    for day, (method, value) in enumerate(VALUES.items(), start=1):
        when = f"2026-01-0{day}T00:00:00+00:00"
        write(store, cells[method], value, started=when, finished=when, train_seconds=10.0 - day, history=HISTORY)
    return store


def test_runs_are_listed_with_what_decides_and_where_they_lie(store, listing):
    code, out, err = listing("outputs/records")
    assert (code, err) == (0, "")
    (flora,) = [line.split() for line in out.splitlines() if " flora " in line]
    (path,) = [path for path in store.folder.glob("*.json") if json.loads(path.read_text())["adapter"] == "flora"]
    assert flora[:2] == ["2026-01-01", "00:00"]
    assert flora[2:6] == ["vtab/eurosat", "convnext", "flora", "r=8"]
    assert {"finished", "accuracy", "0.9100", "50", "9", path.stem, f"outputs/{path.stem}", str(path)} <= set(flora)
    assert out.splitlines()[-1] == "3 runs: 3 finished"


@pytest.mark.parametrize(
    ("column", "order"),
    [("date", ["full", "lora", "flora"]), ("value", ["lora", "flora", "full"]), ("time", ["full", "lora", "flora"])],
)
def test_runs_are_sorted(store, listing, column, order):
    _, out, _ = listing("outputs/records", "--sort", column, "--json")
    assert [json.loads(line)["adapter"] for line in out.splitlines()] == order


def test_one_task_is_picked_by_either_of_its_names(store, listing):
    for name, count in (("vtab", 3), ("eurosat", 3), ("glue", 0)):
        assert listing("outputs/records", "--task", name, "--json")[1].count("\n") == count


def test_broken_records_and_failed_runs_are_listed_as_such(store, listing):
    first, second, _ = sorted(store.folder.glob("*.json"))
    first.write_text(first.read_text()[:100])
    failed = json.loads(second.read_text()) | {"status": "failed", "error": "ValueError('[bold] no')", "value": None}
    second.write_text(json.dumps(failed))
    code, out, _ = listing("outputs/records")
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith(f"broken: {first}")]
    assert "2 runs: " in out
    assert "1 failed" in out


def test_curves_are_drawn_into_the_folder_of_the_run(store, listing):
    some = sorted(store.folder.glob("*.json"))[0]
    some.write_text(json.dumps(json.loads(some.read_text()) | {"history": HISTORY[:1]}))
    _, out, err = listing("outputs/records", "--curves")
    drawn = [line for line in out.splitlines() if line.endswith("curves.png")]
    assert len(drawn) == 2
    for path in drawn:
        with Image.open(path) as picture:
            assert picture.width > picture.height > 300  # a loss and a metric, side by side
    assert err.startswith(f"no curves of run {some.stem}: ")


def test_a_page_is_written_beside_the_folder(store, listing, sandbox, monkeypatch):
    monkeypatch.setattr("flora.results.render.names", lambda: [])
    code, out, err = listing("outputs/records", "--page")
    assert (code, err) == (0, "")
    page = sandbox / "work" / "outputs" / "report" / "report.html"
    assert out.splitlines()[-1] == str(page)
    assert all(f"{path.name}" in page.read_text() for path in store.folder.glob("*.json"))


def test_tests_of_a_run_and_runs_of_other_lengths_are_told_apart(store, listing):
    anew = {"trainer.max_eval_examples": {"now": 50, "trained": None}, "data": {"now": "ab", "trained": "cd"}}
    for path, steps, changes in zip(
        sorted(store.folder.glob("*.json")),
        (None, 40, 300),
        (
            {"task": "imagefolder", "dataset": "/home/me/photos"},
            {"mode": "eval", "execution": {"set_anew": anew}},
            {"mode": "eval"},
        ),
        strict=True,
    ):
        record = json.loads(path.read_text()) | changes
        record["config"]["trainer"]["max_steps"] = steps
        record["config"]["mode"] = record["mode"]
        record["config"]["task"] |= {"name": record["task"], "dataset": record["dataset"]}
        record["run_id"] = recorded_id(record["config"])
        path.unlink()
        store.path(record["run_id"]).write_text(json.dumps(record))
    _, out, _ = listing("outputs/records", "--sort", "length")
    lines = [line for line in out.splitlines() if "accuracy" in line]
    assert " imagefolder /home/me/photos " in lines[0]
    assert " vtab/eurosat (tested again, trainer.max_eval_examples=50, other data) " in lines[1]
    assert " vtab/eurosat (tested again) " in lines[2]
    lengths = [re.search(r"(\S+) (epochs|steps)", line).groups() for line in lines]
    assert lengths == [(lengths[0][0], "epochs"), ("40", "steps"), ("300", "steps")]


def test_a_run_that_is_on_shows_what_it_is_and_since_when(sandbox, listing):
    about = {"task": "digits", "dataset": "digits", "model": "resnet10t", "adapter": "flora", "seed": 3}
    with Store("outputs/records").lock("0123456789ab", about=about) as claim:
        since = json.loads(claim.path.read_text())["since"]
        code, out, _ = listing("outputs/records")
    assert code == 0
    (line,) = [line.split() for line in out.splitlines() if "0123456789ab" in line]
    assert line[:5] == [*since[:16].split("T"), "digits", "resnet10t", "flora"]
    assert {"running", "3"} <= set(line)


def test_a_folder_that_is_not_there_is_one_line(listing):
    code, _, err = listing("nowhere")
    assert code == 2
    assert err == (
        "error: there is no folder nowhere: a first run of train.py makes it, or name the folder of your records\n"
    )
