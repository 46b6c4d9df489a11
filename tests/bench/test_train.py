"""bench_train.py on a small network: the real trainer against a plain loop."""

import json
from types import SimpleNamespace

import pytest
import torch

from flora.bench import loop
from flora.bench.loop import StepClock, given
from flora.bench.networks import network
from scripts import bench_train
from scripts.bench_train import Noise

QUICK = ("--model", "test_convnext", "--batch", 2, "--size", 32, "--device", "cpu", "--r", 2, "--rounds", 1)


def test_train_py_and_the_bare_step_are_compared(run, tmp_path):
    file = tmp_path / "train.json"
    code, out, _ = run(
        bench_train.bench_train, *QUICK, "--steps", 2, "--warmup", 1, "--trainer", "weight_decay=0.01", "--json", file
    )
    result = json.loads(file.read_text())
    (row,) = result["rows"]
    assert code == 0
    assert row["method"] == "flora"
    assert row["train"] > 0
    assert 0 < row["loss"] < 100
    assert result["processes"] == 1
    assert row["share"] == pytest.approx(row["train"] / row["bare"], rel=0.05)
    assert result["trainer"] == {"weight_decay": 0.01}
    assert "train.py" in out


def test_the_clock_reads_between_two_steps_only(monkeypatch):
    now = iter([100.0, 107.5])
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(now))
    clock = StepClock(first=2, last=5)
    for number in range(1, 6):
        clock.on_step_end(None, SimpleNamespace(global_step=number), None)
    assert clock.seconds == 7.5


def test_noise_goes_through_a_tasks_own_datasets_and_augmentation():
    task = Noise(examples=14, batch=2)
    splits = task.load_for(network("test_convnext", size=32).spec, None)
    assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [14, 2, 2]
    assert (splits.train.images.dtype, splits.train.images.shape[1:]) == (torch.uint8, (3, 32, 32))
    assert task.augment() is not None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--methods magic", "magic"),
        ("--batch 0", "--batch"),
        ("--model deberta", "deberta"),
        ("--trainer speed", "KEY=VALUE"),
        ("--trainer speed=1", "speed"),
        ("--trainer max_grad_norm=-1", "max_grad_norm"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, run):
    code, out, err = run(bench_train.bench_train, "--device", "cpu", *arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert said in err


def test_settings_are_read_as_yaml():
    assert given(["cuda_graph=true", "num_workers=4"]) == {"cuda_graph": True, "num_workers": 4}
