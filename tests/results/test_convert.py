"""`python scripts/convert_records.py FOLDER`: records of schema 1 get the ids of today, and keep every number."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from flora.config import recorded_cell, recorded_id
from flora.launch.entry import main
from flora.results import Store
from flora.training.identity import Identity, notes
from scripts.convert_records import convert_records

OLD = Path(__file__).with_name("schema1")  # as they shipped
CHANGED = {"schema_version", "run_id", "config"}
DECIDED_NOTHING = {("adapter", "lr"), ("adapter", "head_lr"), ("trainer", "head_lr")}


@pytest.fixture
def convert(script):
    """Run convert_records.py on a folder: (exit code, stdout, stderr)."""
    entry = partial(main, convert_records, trace=lambda: False)
    return lambda folder: script(entry, "convert_records.py", folder)


@pytest.fixture
def old(tmp_path):
    """Records of schema 1 by the id that they had, in a folder of their own."""
    shutil.copytree(OLD, tmp_path / "records")
    return tmp_path / "records", {path.stem: json.loads(path.read_text()) for path in OLD.glob("*.json")}


def settings(config):
    groups = {group: settings for group, settings in config.items() if isinstance(settings, dict)}
    flat = {(group, key): value for group, settings in groups.items() for key, value in settings.items()}
    return flat | {(key,): value for key, value in config.items() if key not in groups}


def test_every_value_is_as_it_was(old, convert):
    folder, before = old
    code, _, err = convert(folder)
    assert code == 0, err
    contents = Store(folder).read_all()
    assert (len(contents.records), contents.problems) == (len(before), [])
    for record in map(contents.whole, contents.records):
        was = before[recorded_cell(record["config"])]
        assert {key: record[key] for key in was.keys() - CHANGED} == {key: was[key] for key in was.keys() - CHANGED}
        new, old_settings = settings(record["config"]), settings(was["config"])
        assert {key: value for key, value in new.items() if key[0] != "inputs"}.items() <= old_settings.items()
        assert old_settings.keys() - new.keys() <= DECIDED_NOTHING
        assert record["run_id"] == recorded_id(record["config"])
    assert convert(folder)[0] == 0, "once more changes nothing"
    assert Store(folder).read_all().records == contents.records


def test_a_table_finds_them_only_when_converted_and_says_so(old, convert):
    folder, before = old
    contents = Store(folder).read_all()
    assert contents.records == {}
    assert len(contents.problems) == len(before)
    assert all("python scripts/convert_records.py converts the folder" in problem for problem in contents.problems)
    (said,) = notes(Identity("run", "cell", {"inputs": {}}), contents)
    assert said in contents.problems, "a new run says it as well, once"
    convert(folder)
    assert all(Store(folder).read_all().state(cell) == "finished" for cell in before)


def test_what_is_not_what_it_says_stays_as_it_is(old, convert):
    folder, before = old
    path = folder / f"{min(before)}.json"
    path.write_text(json.dumps(before[path.stem] | {"config": before[max(before)]["config"]}))
    code, _, err = convert(folder)
    assert code == 2
    assert (
        f"error: 1 records are left as they were; {path}: not converted (its config is that of run {max(before)})"
        in err
    )
    assert json.loads(path.read_text())["schema_version"] == 1


def test_what_it_trained_is_told_its_ids(old, convert, tmp_path):
    folder, before = old
    path = folder / f"{min(before)}.json"
    path.write_text(json.dumps(before[path.stem] | {"adapter_path": str(tmp_path)}))
    (tmp_path / "run.json").write_text(json.dumps({"run_id": min(before), "value": 0.5}))
    convert(folder)
    said = json.loads((tmp_path / "run.json").read_text())
    assert (said["cell_id"], said["value"]) == (min(before), 0.5)
    assert Store(folder).finished(said["run_id"]) is not None
