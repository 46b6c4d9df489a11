"""What trains nothing starts at once: it imports neither torch nor transformers nor PEFT."""

import re
import subprocess
import sys

import pytest

from flora.config import composed
from flora.files import ROOT
from flora.results import Store
from flora.results.cells import Cell, load
from flora.training.identity import identify
from scripts.make_tables import make_tables
from tests.results.records import write

HEAVY = {"torch", "transformers", "peft"}


def imported(*command, code=0):
    """Packages that a script imports, and what it says: (names, stdout, stderr)."""
    command = [sys.executable, "-X", "importtime", *map(str, command)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr[-2000:]
    names = re.findall(r"^import time: .*\| +([\w.]+)$", ended.stderr, re.MULTILINE)
    assert "hydra" in names
    return {name.partition(".")[0] for name in names}, ended.stdout, ended.stderr


def test_a_script_that_needs_torch_is_told_from_these():
    assert "torch" in imported("-c", "import hydra, torch")[0]


@pytest.mark.parametrize("option", [["--help"], ["--cfg", "job"], ["adapter=lora", "--cfg", "job"]])
def test_asking_train_py_how_it_is_called(option):
    names, out, _ = imported("train.py", *option)
    assert not names & HEAVY
    assert "adapter" in out


@pytest.mark.parametrize(
    ("override", "message"),
    [("mode=trian", "mode must be"), ("seed=-1", "seed must be"), ("force=1", "force must be"), ("model=no", "no")],
)
def test_a_setting_that_no_run_may_have_is_refused(override, message):
    names, _, err = imported("train.py", override, code=2)
    assert not names & HEAVY
    assert message in err.splitlines()[-1]


def asked_before(monkeypatch, tmp_path, *overrides):
    """Which run these ask for, as an earlier call has found out and keeps."""
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    return identify(composed([*overrides, "paths.data=nodata"]))


@pytest.mark.parametrize("dataset", ["dsprites_location", "dsprites_loc"])
def test_a_run_whose_record_exists(dataset, tmp_path, monkeypatch):
    cell = Cell(("task=vtab", "task.dataset=dsprites_location", "adapter=lora", "seed=3"))
    asks = asked_before(monkeypatch, tmp_path, *cell.overrides, "trainer.device=cpu")
    write(Store(tmp_path), cell, 0.75, run_id=asks.run_id, config=asks.config)
    asked = ["adapter=lora", "seed=3", f"task.dataset={dataset}", "trainer.device=cpu", f"paths.results={tmp_path}"]
    names, out, err = imported("train.py", *asked, "paths.data=nodata")
    assert not names & HEAVY
    assert out == f"record: {tmp_path / asks.run_id}.json\n"
    assert "finished before: dsprites_location convnext lora: test accuracy 0.7500" in err


def test_an_evaluation_whose_record_exists(tmp_path, monkeypatch):
    saved = tmp_path / "run" / "adapter"
    saved.mkdir(parents=True)
    (saved / "adapter_model.safetensors").write_bytes(b"weights")
    asked = ["adapter=lora", "mode=eval", f"checkpoint={tmp_path / 'run'}"]
    cell = Cell(("adapter=lora",))
    asks = asked_before(monkeypatch, tmp_path, "adapter=lora", "mode=eval", f"checkpoint={saved}")
    write(Store(tmp_path), cell, 0.5, run_id=asks.run_id, mode="eval", config=asks.config)
    names, out, _ = imported("train.py", *asked, f"paths.results={tmp_path}", "paths.data=nodata")
    assert not names & HEAVY
    assert out.startswith("record: ")


def test_the_status_of_a_table(tmp_path):
    names, out, _ = imported("scripts/reproduce.py", "eurosat", "--status", "--results", tmp_path)
    assert not names & HEAVY
    assert len(out.splitlines()) == 24


def test_a_check_of_rendered_tables(tmp_path, script):
    for cell in load("eurosat").cells[:3]:
        write(Store(tmp_path / "records"), cell, 0.5)
    asked = ["scripts/make_tables.py", "eurosat", "--results", tmp_path / "records", "--output", tmp_path / "out"]
    assert script(make_tables, *asked)[0] == 0
    names, _, _ = imported(*asked, "--check")
    assert not names & {*HEAVY, "matplotlib", "scipy"}
    (tmp_path / "out" / "tables" / "eurosat.md").write_text("edited by hand")
    assert not imported(*asked, "--check", code=1)[0] & HEAVY
