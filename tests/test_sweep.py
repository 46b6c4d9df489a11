"""`python train.py -m`: every cell is tried, whoever launches it, and the sweep's end says what failed."""

import json
import subprocess
import sys

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
        ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"],
    ],
    ids=["joblib", "submitit"],
)
def test_other_launchers_do_the_same_in_processes_of_their_own(tmp_path, launcher):
    if "submitit" in launcher[0]:
        pytest.importorskip("submitit", reason="pip install flora[slurm]")
    ended = sweep(tmp_path, "trainer.label_smoothing=0,2,0.1", *launcher)
    assert ended.returncode == 1, ended.stderr
    assert "sweep: 3 cells: 2 finished, 1 failed, 0 running elsewhere" in ended.stderr
    assert len(records(tmp_path)) == 2
