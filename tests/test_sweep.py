"""`python train.py -m`: every cell is tried, whoever launches it, and the sweep's end says what failed."""

import json
import random
import subprocess
import sys
import time

import pytest

TINY = (
    *("task=digits", "model=timm", "model.timm_name=resnet10t", "model.pretrained=false", "trainer.max_steps=2"),
    *("trainer.max_eval_examples=16", "trainer.batch_size=8", "adapter=linear_probe", "logger=none"),
)


def sweep(folder, *overrides, **options):
    command = [
        sys.executable,
        "train.py",
        "-m",
        *TINY,
        f"paths.output={folder}/outputs",
        f"paths.results={folder}/results",
    ]
    return subprocess.run([*command, *overrides], capture_output=True, text=True, timeout=600, **options)


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        ["launcher=gpu_pool", "workers=2"],
        ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"],
    ],
    ids=["joblib", "gpu_pool", "submitit"],
)
def test_other_launchers_do_the_same_in_processes_of_their_own(tmp_path, launcher):
    if "submitit" in launcher[0]:
        pytest.importorskip("submitit", reason="pip install flora[slurm]")
    ended = sweep(tmp_path, "trainer.label_smoothing=0,2,0.1", *launcher)
    assert ended.returncode == 1, ended.stderr
    assert "sweep: 3 cells: 2 finished, 1 failed, 0 running elsewhere" in ended.stderr
    assert len(records(tmp_path)) == 2


CELLS = range(24)
LABEL = "digits/digits resnet10t linear_probe seed {}: test accuracy"


def start(folder, log, seeds):
    command = [
        sys.executable,
        "train.py",
        "-m",
        *TINY,
        f"paths.output={folder}/outputs",
        f"paths.results={folder}/results",
    ]
    seeds = f"seed={','.join(map(str, seeds))}"
    return subprocess.Popen([*command, seeds], stdout=subprocess.DEVNULL, stderr=log.open("w"))


def numbers(folder):
    keys = ("seed", "status", "value", "metrics", "trainable_params", "config")
    return {r["run_id"]: [r[key] for key in keys] for r in records(folder)}


@pytest.mark.slow
def test_a_sweep_killed_three_times_ends_as_one_that_was_left_alone(tmp_path):
    chance, folder = random.Random(0), tmp_path / "killed"
    for time_ in range(3):
        sweeping = start(folder, tmp_path / f"{time_}.log", CELLS)
        before = len(list((folder / "results").glob("*.json")))
        while sweeping.poll() is None and len(list((folder / "results").glob("*.json"))) < before + 4:
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 3))
        sweeping.kill()
        sweeping.wait()
        assert before < len(records(folder)) < len(CELLS)
    assert start(folder, tmp_path / "3.log", CELLS).wait(timeout=600) == 0
    said = "".join((tmp_path / f"{time_}.log").read_text() for time_ in range(4))
    assert [said.count(LABEL.format(seed)) for seed in CELLS] == [1] * len(CELLS), "no cell runs to its end twice"

    assert start(tmp_path / "calm", tmp_path / "calm.log", CELLS).wait(timeout=600) == 0
    assert len(numbers(folder)) == len(CELLS)
    assert numbers(folder) == numbers(tmp_path / "calm")


@pytest.mark.slow
def test_two_sweeps_over_the_same_cells_share_them(tmp_path):
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    both = [start(tmp_path / "shared", log, range(6)) for log in logs]
    assert [sweeping.wait(timeout=600) for sweeping in both] == [0, 0]
    said = "".join(log.read_text() for log in logs)
    assert [said.count(LABEL.format(seed)) for seed in range(6)] == [1] * 6
    assert len(records(tmp_path / "shared")) == 6
