"""`python train.py -m`: every cell is tried, whoever launches it, and the sweep's end says what failed."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from flora import extras

TINY = (
    *("task=digits", "model=timm", "model.timm_name=resnet10t", "model.pretrained=false", "trainer.max_steps=2"),
    *("trainer.max_eval_examples=16", "trainer.batch_size=8", "adapter=linear_probe", "logger=none"),
    "model.image_size=32",
)


LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "gpu_pool": ["launcher=gpu_pool", "workers=2"],
    "submitit": ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"],
}


def needs(launcher):
    if launcher == "submitit":
        pytest.importorskip("submitit", reason=extras.needs("this test", "submitit"))


def command(folder, *overrides):
    places = [f"paths.output={folder}/outputs", f"paths.results={folder}/results"]
    return [sys.executable, "train.py", "-m", *TINY, *places, *overrides]


def sweep(folder, *overrides, **options):
    return subprocess.run(command(folder, *overrides), capture_output=True, text=True, timeout=600, **options)


def records(folder):
    return [json.loads(path.read_text()) for path in sorted((folder / "results").glob("*.json"))]


def test_a_failing_cell_does_not_stop_the_others_and_the_sweep_says_so(tmp_path):
    ended = sweep(tmp_path, "trainer.label_smoothing=0,2,0.1")
    assert ended.returncode == 1
    assert "sweep: 3 cells: 2 finished, 1 failed, 0 running elsewhere" in ended.stderr
    assert ended.stderr.strip().splitlines()[-1].startswith("failed: ")
    assert "trainer.label_smoothing=2" in ended.stderr.strip().splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert sorted(r["config"]["trainer"]["label_smoothing"] for r in records(tmp_path)) == [0, 0.1]


def test_what_an_earlier_sweep_left_in_the_same_folder_does_not_count(tmp_path):
    cells = tmp_path / "sweep" / "cells"
    cells.mkdir(parents=True)
    for number in (0, 1):
        left = {"overrides": ["seed=9"], "outcome": "failed", "message": "earlier"}
        (cells / f"{number}.json").write_text(json.dumps(left))
    ended = sweep(tmp_path, f"hydra.sweep.dir={tmp_path}/sweep", "trainer.lr=-1", "seed=0")
    assert "sweep: 1 cells: 0 finished, 1 failed, 0 running elsewhere" in ended.stderr
    assert "seed=9" not in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_other_launchers_do_the_same_in_processes_of_their_own(tmp_path, launcher):
    needs(launcher)
    ended = sweep(tmp_path, "trainer.label_smoothing=0,2,0.1", *LAUNCHERS[launcher])
    assert ended.returncode == 1, ended.stderr
    assert "sweep: 3 cells: 2 finished, 1 failed, 0 running elsewhere" in ended.stderr
    assert len(records(tmp_path)) == 2


LONG = ("trainer.epochs=2000", "trainer.max_steps=40000", "trainer.checkpoint_every=50")


def sweeping(folder, log, *overrides):
    return subprocess.Popen(command(folder, *overrides), stdout=subprocess.DEVNULL, stderr=log.open("w"))


def wait_for(what, process):
    while not what():
        assert process.poll() is None, "it ended too early"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_signal_to_the_sweep_reaches_the_processes_of_its_launcher(tmp_path, launcher):
    needs(launcher)
    log = tmp_path / "log"
    running = sweeping(tmp_path, log, *LONG, "seed=0,1,2", *LAUNCHERS[launcher])
    begun = 3 if launcher == "submitit" else 2
    wait_for(lambda: len({p.parent for p in tmp_path.glob("outputs/*/checkpoints/[0-9]*")}) == begun, running)
    running.terminate()
    assert running.wait(timeout=120) == 75, log.read_text()
    said = log.read_text()
    assert "sweep: 3 cells: 0 finished, 0 failed, 0 running elsewhere, 3 interrupted" in said
    assert "Traceback" not in said
    assert [record["status"] for record in records(tmp_path)] == ["interrupted"] * begun
    newest = {path.parent: path for path in sorted(tmp_path.glob("outputs/*/checkpoints/[0-9]*"))}
    steps = [json.loads((path / "trainer_state.json").read_text())["global_step"] for path in newest.values()]
    assert any(step % 50 for step in steps), "written at the signal, not by the count"


def test_a_stopped_sweep_says_how_many_cells_it_never_began(tmp_path):
    log = tmp_path / "log"
    running = sweeping(tmp_path, log, *LONG, "seed=0,1,2", "trainer.lr=1e-3,1e-2")
    wait_for(lambda: list(tmp_path.glob("outputs/*/checkpoints/[0-9]*")), running)
    running.terminate()
    assert running.wait(timeout=120) == 75, log.read_text()
    said = log.read_text()
    assert "sweep: 6 cells: 0 finished, 0 failed, 0 running elsewhere, 1 interrupted, 5 not begun" in said
    assert "interrupted: the signal SIGTERM asked it to stop" in said


CELLS = range(24)
LABEL = "digits resnet10t linear_probe seed {}: test accuracy"


def seeds(numbers):
    return f"seed={','.join(map(str, numbers))}"


@pytest.mark.slow
def test_a_signal_that_asks_submitit_for_a_requeue_gets_it_after_a_checkpoint(tmp_path):
    needs("submitit")
    log = tmp_path / "log"
    short = ("trainer.epochs=2000", "trainer.max_steps=400", "trainer.checkpoint_every=10")
    running = sweeping(tmp_path, log, *short, "seed=0", *LAUNCHERS["submitit"])
    wait_for(lambda: list(tmp_path.glob("outputs/*/checkpoints/[0-9]*")), running)
    (lock,) = tmp_path.glob("results/.locks/*.lock")
    worker = json.loads(lock.read_text())["pid"]
    os.kill(worker, signal.SIGUSR2)  # what submitit asks Slurm to send before the time is up
    assert running.wait(timeout=120) == 0, log.read_text()
    assert "sweep: 1 cells: 1 finished" in log.read_text()
    (record,) = records(tmp_path)
    assert record["status"] == "finished"
    assert len(record["execution"]["resumed_at_steps"]) == 1, "the requeued job went on"


def numbers(folder):
    keys = ("seed", "status", "value", "metrics", "trainable_params", "config")
    return {r["run_id"]: [r[key] for key in keys] for r in records(folder)}


@pytest.mark.slow
def test_a_sweep_killed_three_times_ends_as_one_that_was_left_alone(tmp_path):
    chance, folder = random.Random(0), tmp_path / "killed"
    for time_ in range(3):
        process = sweeping(folder, tmp_path / f"{time_}.log", seeds(CELLS))
        before = len(list((folder / "results").glob("*.json")))
        while process.poll() is None and len(list((folder / "results").glob("*.json"))) < before + 4:
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 3))
        process.kill()
        process.wait()
        assert before < len(records(folder)) < len(CELLS)
    assert sweeping(folder, tmp_path / "3.log", seeds(CELLS)).wait(timeout=600) == 0
    said = "".join((tmp_path / f"{time_}.log").read_text() for time_ in range(4))
    assert [said.count(LABEL.format(seed)) for seed in CELLS] == [1] * len(CELLS), "no cell runs to its end twice"

    assert sweeping(tmp_path / "calm", tmp_path / "calm.log", seeds(CELLS)).wait(timeout=600) == 0
    assert len(numbers(folder)) == len(CELLS)
    assert numbers(folder) == numbers(tmp_path / "calm")


@pytest.mark.slow
def test_two_sweeps_over_the_same_cells_share_them(tmp_path):
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    both = [sweeping(tmp_path / "shared", log, seeds(range(6))) for log in logs]
    assert [process.wait(timeout=600) for process in both] == [0, 0]
    said = "".join(log.read_text() for log in logs)
    assert [said.count(LABEL.format(seed)) for seed in range(6)] == [1] * 6
    assert len(records(tmp_path / "shared")) == 6
