"""`python scripts/reproduce.py TABLE`: what is done, what is left, how long it will take."""

import os
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir

from flora.config import cell_id, recorded_id
from flora.files import ROOT
from flora.launch.entry import main
from flora.launch.pool import Pool
from flora.results import Store
from flora.results.cells import load
from flora.results.store import Contents
from scripts import reproduce
from tests.results.records import settings_of, write


@pytest.fixture
def call(tmp_path, monkeypatch, script):
    """Run reproduce.py in this process, its cells not: (exit code, stdout, stderr, cells run)."""

    def run(*arguments, codes=None):
        ran = []

        def cell(cell, extra, stores, report, workers):
            ran.append((cell, extra))
            return (codes or {}).get(cell.method, 0)

        monkeypatch.setattr(reproduce, "run", cell)
        monkeypatch.setattr(reproduce, "SHIPPED", tmp_path / "shipped")
        entry = partial(main, reproduce.reproduce, trace=lambda: False)
        return *script(entry, "reproduce.py", *arguments, "--results", tmp_path), ran

    return run


@pytest.fixture
def store(tmp_path):
    """eurosat with three cells finished, one failed, one interrupted; each finished one took 100 s."""
    store = Store(tmp_path)
    for cell, status in zip(load("eurosat").cells, ["finished"] * 3 + ["failed", "interrupted"], strict=False):
        write(store, cell, 0.5, status=status)
    return store


def test_the_status_shows_every_cell_and_the_time_left(store, call):
    code, out, err, ran = call("eurosat", "--status")
    assert code == 0
    assert ran == []
    words = [line.split()[0] for line in out.splitlines()]
    assert [words.count(word) for word in ("finished", "failed", "interrupted", "missing")] == [3, 1, 1, 19]
    assert err.startswith("eurosat: 3 of 24 cells finished, 1 failed, 1 interrupted, 19 missing; about 0:33:20 left")


def test_a_running_cell_shows_as_running_and_jobs_divide_the_time_left(store, call):
    with store.lock(load("eurosat").cells[10].cell_id):
        _, out, err, _ = call("eurosat", "--status", "--jobs", "2")
    assert out.splitlines()[10].startswith("running ")
    assert "about 0:16:40 left" in err


def test_odd_entries_among_locks_and_records_are_named_and_left_out(store, call, tmp_path):
    (tmp_path / ".locks").mkdir()
    for folder, ending in ((tmp_path, "json"), (tmp_path / ".locks", "1.lock")):
        (folder / f"copied.{ending}").symlink_to("nowhere")
        os.mkfifo(folder / f"pipe.{ending}")
        (folder / f"folder.{ending}").mkdir()
        (folder / f"bytes\udcff.{ending}").touch()
    code, _, err, _ = call("eurosat", "--status")
    assert code == 0
    assert "3 of 24 cells finished, 1 failed, 1 interrupted" in err
    named = [line.split(":")[1].rpartition("/")[2] for line in err.splitlines() if line.startswith("left out: ")]
    assert [name.partition(".")[0].partition("\\")[0] for name in sorted(named)] == [
        *("bytes", "copied", "copied", "folder", "folder", "pipe", "pipe")
    ]  # of the locks the one with half a character may still be written by its owner


def test_a_cell_of_more_than_a_day_counts_whole_and_jobs_below_one_are_refused(store, call):
    for cell in load("eurosat").cells[:3]:
        write(store, cell, 0.5, started="2026-01-01T00:00:00+00:00", finished="2026-01-02T06:00:00+00:00")
    assert "about 25 days, 0:00:00 left" in call("eurosat", "--status")[2]  # 20 cells of 30 hours
    code, _, err, ran = call("eurosat", "--jobs", "0")
    assert (code, ran) == (2, [])
    assert "error: --jobs 0" in err


def test_a_dry_run_prints_the_commands_of_what_is_left(store, call, tmp_path):
    _, out, _, ran = call("eurosat", "--dry-run", "paths.data=d")
    assert ran == []
    lines = out.splitlines()
    assert len(lines) == 20
    assert all(line.startswith("python train.py task=vtab task.dataset=eurosat") for line in lines)
    assert all(line.endswith(f"paths.results={tmp_path} paths.data=d") for line in lines)


def test_only_some_cells_can_be_asked_for(store, call):
    _, out, err, _ = call("eurosat", "--status", "--only", "adapter=flora,lora", "--only", "seed=1")
    assert all("adapter=flora" in line or "adapter=lora" in line for line in out.splitlines())
    assert all("seed=1" in line for line in out.splitlines())
    assert len(out.splitlines()) == 4  # two models
    assert "of 4 cells finished" in err
    code, _, err, ran = call("eurosat", "--only", "adapter=lorra")
    assert (code, ran) == (2, [])
    assert "error: --only adapter=lorra: eurosat has no adapter=lorra: choose among flora, lora" in err
    _, _, err, _ = call("eurosat", "--only", "adaptr=lora")
    assert "eurosat has no adaptr=lora: no cell sets it" in err


@pytest.mark.parametrize("override", ["adapter.r=4", "seed=7", "model=resnet50", "trainer.max_steps=1"])
def test_overrides_that_would_make_other_runs_are_refused(store, call, override):
    code, _, err, ran = call("eurosat", "paths.data=d", override)
    assert (code, ran) == (2, [])
    assert f"error: paths.data=d {override}: would change the result of task=vtab" in err
    assert len(call("eurosat", "paths.data=d", "logger=csv", "trainer.device=cpu")[3]) == 20


def test_a_file_without_cells_is_said(call):
    code, _, err, _ = call("claims", "--status")
    assert code == 2
    assert "error: experiments/claims.yaml lists no cells to run" in err


def test_a_cell_that_does_not_set_the_key_stays(call):
    _, out, _, _ = call(
        "table3_glue", "--status", "--only", "adapter=full,lora", "--only", "adapter.r=8", "--only", "seed=0"
    )
    full, lora = ([line for line in out.splitlines() if f"adapter={name} " in f"{line} "] for name in ("full", "lora"))
    assert full, "which has no rank"
    assert lora
    assert not any("adapter.r=" in line for line in full)
    assert all("adapter.r=8" in line for line in lora)


def test_what_is_left_is_run_and_failed_cells_on_request(store, call):
    code, _, err, ran = call("eurosat")
    assert len(ran) == 20
    assert code == 1
    assert "error: 1 cells failed (--retry runs them again)" in err
    code, _, _, ran = call("eurosat", "--retry")
    assert (code, len(ran)) == (0, 21)
    assert all("retry=true" in extra for _, extra in ran)


def test_each_cell_is_told_its_table_and_what_it_is_called_apart_from_its_seed(store, call):
    _, _, _, ran = call("vtab", "--retry")
    told = {cell: dict(word.split("=", 1) for word in extra) for cell, extra in ran}
    assert {words["table"] for words in told.values()} == {"vtab"}
    named = {(c.task, c.model, c.method): words["cell"] for c, words in told.items()}
    assert len(named) == len(set(named.values())) == 5 * 26
    assert named["eurosat", "convnext", "flora"] == '"eurosat convnext flora"'
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        cell, extra = ran[-1]
        cfg = compose("train", overrides=[*cell.overrides, *extra, "logger=wandb"])
    assert f'"{cfg.cell}"' == told[cell]["cell"]
    assert cfg.logger._target_ == "flora.training.Wandb", "the last choice of a group wins"
    assert cell_id(cfg) == cell.cell_id


def test_what_others_start_from_is_run_again_where_its_outputs_are_gone(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = [cell for cell in load("instruct").cells if cell.method == "linear_probe"][:2]
    for cell in (first, second):
        write(Store(tmp_path), cell, 0.5)
    write(Store(tmp_path), first, 0.5, adapter_path="outputs/run/adapter")
    (tmp_path / "outputs" / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "outputs" / "run" / "adapter" / "model.safetensors").touch()
    some = ("--only", "adapter=flora", "--only", "seed=1")  # neither of the two
    _, out, err, _ = call("instruct", *some, "--status")
    assert err.startswith("instruct: 0 of 3 cells finished, 1 to run again, 2 missing; about 0:05:00 left")
    assert f"to run again {second.cell_id} " in out
    _, _, _, ran = call("instruct", *some)
    assert [cell.method for cell, _ in ran] == ["linear_probe", "flora", "flora"]
    assert ran[0][0] == second
    assert ran[0][1][-1] == "force=true"
    assert not any("force=true" in extra for _, extra in ran[1:])


def test_what_others_start_from_has_ended_before_they_start(store, monkeypatch):
    told = []

    def cell(cell, extra, stores, report, workers):
        told.append(("start", cell))
        time.sleep(0.05)
        told.append(("end", cell))
        return 0

    monkeypatch.setattr(reproduce, "run", cell)
    cells = load("instruct").cells[:6]
    first = reproduce.started_from(load("instruct"), cells)
    assert first == cells[:1]
    reproduce.run_all({cell: [] for cell in reversed(cells)}, first, 3, [store])
    assert told[:2] == [("start", cells[0]), ("end", cells[0])]
    assert len(told) == 12
    llava = [cell for cell in load("table4_llava", "paper").cells if not cell.not_runnable_yet]
    first = reproduce.started_from(load("table4_llava", "paper"), llava[-4:])  # tests of FLoRA's model
    assert [cell.task for cell in first] == ["llava_pretrain", "llava_instruct"]
    told.clear()
    reproduce.run_all({cell: [] for cell in (*llava[-4:], *reversed(first))}, first, 3, [store])
    assert told[:4] == [(when, cell) for cell in first for when in ("start", "end")]
    assert {cell for _, cell in told[4:]} == {*llava[-4:]}


def test_what_another_process_runs_again_is_not_forced_once_more(store):
    asked, answers = [], iter([(75, "another process does"), (0, "finished")])
    workers = SimpleNamespace(run=lambda words, begin: asked.append(words) or next(answers))
    assert reproduce.run(load("eurosat").cells[0], ["force=true"], [store], reproduce.Report(1), workers) == 0
    assert ["force=true" in words for words in asked] == [True, False]


def test_who_waits_for_another_process_stops_with_the_pool(store, monkeypatch):
    """Ctrl-C must not wait until the other process has done the cell."""
    monkeypatch.setattr(Contents, "state", lambda *_: "running")
    workers = Pool([])
    answers = iter([(75, "another process does"), (130, "interrupted")])
    monkeypatch.setattr(workers, "run", lambda words, begin: next(answers))
    threading.Timer(0.2, workers.stop, [True]).start()
    assert reproduce.run(load("eurosat").cells[0], [], [store], reproduce.Report(1), workers) == 130


def test_a_failing_cell_does_not_stop_the_others(store, call):
    code, _, err, ran = call("eurosat", "--retry", codes={"lora": 1})
    assert (code, len(ran)) == (1, 21)
    assert len([line for line in err.splitlines() if line.startswith("failed: ")]) == 6


def test_a_cell_that_was_interrupted_has_not_failed(store, call):
    """The fifth cell, FLoRA's, left a record of an interrupted run; the others that ended with 75 left none."""
    code, _, err, _ = call("eurosat", codes={"flora": 75})
    assert code == 1
    assert [line.split(":")[0] for line in err.splitlines()].count("interrupted") == 1
    assert "cells failed (--retry runs them again), 1 cells interrupted (the same command goes on with them)" in err


def test_cells_that_cannot_run_yet_are_shown_and_left_alone(call):
    code, out, err, _ = call("table2_internvit", "--scale", "paper", "--status")
    assert code == 0
    assert all(line.startswith("not runnable yet flora segments with") for line in out.splitlines())
    assert "4 not runnable yet" in err
    assert call("table2_internvit", "--scale", "paper")[3] == []


def test_an_unknown_table_is_one_line(call):
    code, _, err, _ = call("tabel3", "--status")
    assert code == 2
    assert "no table 'tabel3'" in err
    assert "table3_glue" in err


def test_cells_that_ship_as_finished_count_and_what_is_left_goes_to_a_folder_of_its_own(call, tmp_path):
    shipped, cells = Store(tmp_path / "shipped"), load("eurosat").cells
    for cell in cells[:5]:
        write(shipped, cell, 0.5)
    write(Store(tmp_path), cells[5], 0.5)
    _, _, err, ran = call("eurosat")
    assert "6 of 24 cells finished" in err
    assert [cell for cell, _ in ran] == cells[6:]
    assert all(f"paths.results={tmp_path}" in extra for _, extra in ran)
    assert "1 of 24 cells finished" in call("eurosat", "--status", "--reuse", "own")[2]


def test_a_cell_with_records_on_two_data_sets_is_left_out_and_both_are_named(call, tmp_path):
    cell, ids = load("eurosat").cells[0], []
    for data in ("a" * 64, "b" * 64):
        settings = settings_of(cell) | {"inputs": {"data": data}}
        ids.append(recorded_id(settings))
        write(Store(tmp_path), cell, 0.5, run_id=ids[-1], config=settings)
    _, _, err, ran = call("eurosat")
    assert "0 of 24 cells finished, 1 ambiguous, 23 missing" in err
    assert f"runs {min(ids)} and {max(ids)} (eurosat convnext {cell.method}) are of one cell" in err
    assert cell not in [ran_cell for ran_cell, _ in ran]


def test_a_cell_starts_from_the_folder_of_the_run_and_not_from_its_own_id(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = load("instruct").cells[0]
    after = next(cell for cell in load("instruct").cells if any(begun == first for _, begun in cell.starts_from))
    write(Store(tmp_path), first, 0.5, adapter_path="elsewhere/run/adapter")
    assert f"model.projector=outputs/{first.cell_id}" in reproduce.placed(after, [Store(tmp_path)])
    (tmp_path / "elsewhere" / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "elsewhere" / "run" / "adapter" / "model.safetensors").touch()
    assert "model.projector=elsewhere/run" in reproduce.placed(after, [Store(tmp_path)])
