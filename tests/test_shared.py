"""Decoded images are made by one process of a sweep and mapped by all; what a sweep leaves is removed."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from flora import memory, shared
from flora.files import ROOT
from flora.tasks.images.digits import Digits
from flora.tasks.vtab.task import Vtab
from tests.tasks.conftest import numbers, write_split  # noqa: F401  a fixture


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder of all sweeps."""
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(shared.VARIABLE, raising=False)
    return tmp_path / "cache" / "shared"


@pytest.fixture
def sweep(place):
    with shared.folder():
        yield Path(os.environ[shared.VARIABLE])


def made(folder):
    return [path.name for path in folder.iterdir() if path.is_dir()]


def test_what_one_has_made_others_map_and_nobody_can_change(sweep):
    calls = []

    def make():
        calls.append(1)
        return {"a": np.arange(6, dtype=np.uint8).reshape(2, 3), "b": np.array([True])}

    for _ in range(2):
        found = shared.once(lambda: "key", make)
        assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert found["b"].tolist() == [True]
        found["a"][:] = 9  # of this process alone
    assert len(calls) == 1
    assert shared.once(lambda: "another key", make)
    assert len(calls) == 2


def test_without_a_sweep_or_a_name_each_makes_its_own(place, tmp_path):
    def asked():
        raise AssertionError("no sweep, no key")

    assert shared.once(asked, lambda: {"a": np.zeros(1)})["a"] == 0
    with shared.folder():
        assert shared.once(lambda: None, lambda: {"a": np.ones(1)})["a"] == 1
        assert not made(Path(os.environ[shared.VARIABLE]))


def test_those_who_ask_at_once_wait_for_the_first(sweep):
    calls, begun = [], threading.Event()

    def make():
        calls.append(1)
        begun.wait(timeout=30)
        return {"a": np.ones(3)}

    found = []
    threads = [threading.Thread(target=lambda: found.append(shared.once(lambda: "key", make))) for _ in range(4)]
    for thread in threads:
        thread.start()
    begun.set()
    for thread in threads:
        thread.join(timeout=30)
    assert len(calls) == 1
    assert [arrays["a"].sum() for arrays in found] == [3] * 4


def test_what_changes_while_it_is_made_is_not_kept(sweep):
    keys = iter(["before", "after"])
    assert shared.once(lambda: next(keys), lambda: {"a": np.ones(1)})["a"] == 1
    assert not made(sweep)


def test_an_error_is_that_of_each_and_leaves_nothing(sweep):
    for _ in range(2):
        with pytest.raises(OSError, match="no such image"):
            shared.once(lambda: "key", lambda: (_ for _ in ()).throw(OSError("no such image")))
    assert not made(sweep)


def test_more_than_half_of_the_memory_is_not_shared_and_that_is_said(sweep, monkeypatch, capsys):
    monkeypatch.setattr(memory, "total", lambda: 3000)
    for name in ("first", "second"):
        assert shared.once(lambda: name, lambda: {"a": np.ones(100)})["a"].sum() == 100  # noqa: B023
    assert len(made(sweep)) == 1
    assert "images are not shared" in capsys.readouterr().err


def test_a_folder_ends_with_its_sweep_and_its_size_is_said(place, capsys):
    with shared.folder():
        shared.once(lambda: "key", lambda: {"a": np.zeros(20_000_000, np.uint8)})
    assert capsys.readouterr().err == "shared among runs: 20 MB of decoded images\n"
    assert shared.VARIABLE not in os.environ
    assert not [path for path in place.iterdir() if path.is_dir()]


def test_what_a_killed_sweep_leaves_the_next_one_removes_and_a_running_one_keeps(place):
    code = (
        "import sys, time, os\nfrom flora import shared\nwith shared.folder():\n"
        " print(os.environ[shared.VARIABLE], flush=True)\n time.sleep(60)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    killed, running = (Path(process.stdout.readline().strip()) for process in processes)
    processes[0].send_signal(signal.SIGKILL)
    processes[0].wait()
    assert killed.is_dir()
    with shared.folder():
        assert not killed.exists()
        assert running.is_dir()
    processes[1].kill()
    processes[1].wait()


def test_a_process_that_outlives_its_sweep_makes_its_own_and_leaves_nothing(sweep, monkeypatch):
    monkeypatch.setenv(shared.VARIABLE, str(sweep / "gone"))
    assert shared.once(lambda: "key", lambda: {"a": np.ones(1)})["a"] == 1
    assert not (sweep / "gone").exists()


@pytest.mark.parametrize(("module", "name"), [(shared, "_mapped"), (np, "load")], ids=["before", "among"])
def test_images_that_are_removed_while_they_are_read_are_made(sweep, monkeypatch, module, name):
    """Who outlives a killed sweep reads from a folder that the next sweep removes."""

    def make():
        return {"a": np.ones(1), "b": np.ones(2)}

    def late(*arguments, **options):
        monkeypatch.setattr(module, name, function)
        shared._remove(sweep)
        return function(*arguments, **options)

    shared.once(lambda: "key", make)
    function = getattr(module, name)
    monkeypatch.setattr(module, name, late)
    found = shared.once(lambda: "key", make)
    assert {name: array.sum() for name, array in found.items()} == {"a": 1, "b": 2}


def test_a_process_in_another_folder_finds_the_images_too(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLORA_CACHE", "cache")
    with shared.folder():
        assert Path(os.environ[shared.VARIABLE]).is_absolute()


def splits(data, interpolation="bicubic", **options):
    task = Vtab(name="vtab", dataset="eurosat", epochs=1, **options)
    return task.load(image_size=16, data_dir=data, interpolation=interpolation)


def same(one, other):
    for split in ("train", "validation", "test"):
        a, b = getattr(one, split), getattr(other, split)
        assert a.images.dtype == b.images.dtype
        assert a.images.equal(b.images)
        assert a.labels.equal(b.labels)
    assert json.dumps(one.facts) == json.dumps(other.facts)


@pytest.mark.parametrize("options", [{}, {"unreadable": "skip"}], ids=["whole", "some skipped"])
def test_shared_images_are_those_of_a_run_on_its_own(place, tmp_path, write_split, options):  # noqa: F811
    broken = {"replace": {1: b"no image", 5: b"none"}} if options else {}
    for split, rows in (("train", 30), ("validation", 8), ("test", 9)):
        write_split(split, rows, start=rows, **broken)
    alone = splits(tmp_path, **options)
    with shared.folder():
        first, second = splits(tmp_path, **options), splits(tmp_path, **options)
        assert len(made(Path(os.environ[shared.VARIABLE]))) == 3
    same(alone, first)
    same(alone, second)


def test_other_contents_and_settings_are_never_taken_for_these(sweep, tmp_path, write_split):  # noqa: F811
    for split, rows in (("train", 30), ("validation", 8), ("test", 9)):
        write_split(split, rows)
    before = splits(tmp_path)
    write_split("train", 30, start=500)
    after = splits(tmp_path)
    assert not after.train.images.equal(before.train.images)
    assert len(made(sweep)) == 6, "files beside it may hold its images: all count"
    splits(tmp_path, interpolation="nearest")
    splits(tmp_path, resize="crop")
    splits(tmp_path, orientation="stored")
    assert len(made(sweep)) == 15


def test_files_that_change_once_they_are_open_are_not_taken_for_the_new_ones(sweep, tmp_path, write_split, monkeypatch):  # noqa: F811
    for split, rows in (("train", 30), ("validation", 8), ("test", 9)):
        write_split(split, rows)
    opened = Vtab._open

    def replaced_behind(task, data_dir):
        found = opened(task, data_dir)  # who has opened the old file goes on reading it
        (tmp_path / "eurosat" / "test.parquet").unlink()
        write_split("test", 9, start=500)
        return found

    with monkeypatch.context() as during:
        during.setattr(Vtab, "_open", replaced_behind)
        assert numbers(splits(tmp_path).test.images.numpy()) == list(range(9))
    assert numbers(splits(tmp_path).test.images.numpy()) == list(range(500, 509))


def test_grey_images_are_shared_where_they_are_resized(place):
    task = Digits(name="digits", dataset="digits", epochs=1)
    alone = task.load(image_size=12)
    with shared.folder():
        same(alone, task.load(image_size=12))
        same(alone, task.load(image_size=12))
        assert len(made(Path(os.environ[shared.VARIABLE]))) == 3
        assert task.load(image_size=12).train.nbytes == alone.train.nbytes
