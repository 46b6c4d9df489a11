"""Twenty runs of `python train.py`, killed with SIGKILL at random moments until they are finished: none is lost.

Killed runs are forked from a process that has imported everything, as importing takes longer than these runs.
"""

import json
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import pytest

TINY = (
    *("task=digits", "model=timm", "model.timm_name=resnet10t", "model.pretrained=false", "model.image_size=32"),
    *("trainer.epochs=2", "trainer.max_eval_examples=64", "trainer.batch_size=64", "trainer.log_every=7"),
    *("trainer.device=cpu", "logger=none", "task.augment=crop", "trainer.drop_path=0.1"),
)
KINDS = [
    ("adapter=flora", "trainer.checkpoint_every=2"),
    ("adapter=lora", "trainer.checkpoint_every=3", "protocol.lr_grid=[1e-3,1e-2]", "trainer.epochs=1"),
    ("adapter=full", "trainer.checkpoint_every=5", "trainer.ema_decay=0.9"),
    ("adapter=linear_probe", "trainer.checkpoint_every=1", "protocol=vtab1k"),
    ("adapter=flora", "trainer.checkpoint_every=2", "protocol=vtab1k", "protocol.lr_grid=[1e-3,1e-2]"),
]
RUNS = [(*KINDS[number % len(KINDS)], f"seed={number}") for number in range(20)]


def attempt(folder, overrides):
    """A run in a process of its own; it says what `python train.py` would, into a file."""
    import torch

    import train
    from flora.launch.worker import _run

    with open(folder / "said.log", "a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    torch.set_num_threads(1)
    places = [f"paths.output={folder}/outputs", f"paths.results={folder}/results"]
    sys.exit(_run(train, [*TINY, *overrides, *places])[0])


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "flora.launch.worker", "flora.adapters", "timm", "peft"])
    return context


def start(processes, folder, overrides):
    folder.mkdir(parents=True, exist_ok=True)
    process = processes.Process(target=attempt, args=(folder, overrides))
    process.start()
    return process


def writing(folder):
    return any(folder.glob("outputs/*/checkpoints/.*.tmp"))


def killed(process, folder, moment, in_write):
    """Kill at a moment, or at the first write after it; None if the run ended before, else whether it was writing."""
    ends = time.monotonic() + moment
    while process.is_alive() and (time.monotonic() < ends or (in_write and not writing(folder))):
        time.sleep(0.0005)
    process.kill()
    process.join()
    return writing(folder) if process.exitcode < 0 else None


def result(folder):
    """What must be equal bit for bit: the record without times and places, and the saved weights."""
    (path,) = folder.glob("results/*.json")
    record = json.loads(path.read_text())
    timings = ("runtime", "per_second", "preparation_time")
    history = [{k: v for k, v in entry.items() if not k.endswith(timings)} for entry in record["history"]]
    selection = {k: v for k, v in record["selection"].items() if k != "seconds"}
    names = ("run_id", "status", "metrics", "value", "lr", "ranks", "config", "trainable_params")
    weights = {p.name: p.read_bytes() for p in Path(record["adapter_path"]).glob("*.safetensors")}
    assert weights
    assert not list(folder.glob("outputs/*/checkpoints"))
    return [record[name] for name in names], history, selection, weights


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_as_those_left_alone(tmp_path, processes):
    chance = random.Random(0)
    began, kills, torn, resumed = time.monotonic(), 0, 0, 0
    for number, overrides in enumerate(RUNS):
        calm, folder = tmp_path / f"calm{number}", tmp_path / f"killed{number}"
        process, started = start(processes, calm, overrides), time.monotonic()
        process.join()
        took = time.monotonic() - started
        assert process.exitcode == 0, (calm / "said.log").read_text()

        wanted, met = chance.choice((1, 2, 3)), 0
        while met < wanted:
            process = start(processes, folder, overrides)
            in_write = killed(process, folder, chance.uniform(0, took), chance.random() < 0.5)
            if in_write is None:
                assert process.exitcode == 0, (folder / "said.log").read_text()
                if met:
                    break
                folder = tmp_path / f"{folder.name}again"  # it was faster than its killer
                continue
            met, torn = met + 1, torn + in_write
        process = start(processes, folder, overrides)
        process.join()
        said = (folder / "said.log").read_text()
        assert process.exitcode == 0, said
        assert result(folder) == result(calm), overrides
        kills, resumed = kills + met, resumed + said.count("going on from checkpoint")
    minutes = (time.monotonic() - began) / 60
    print(f"\n{len(RUNS)} runs, {kills} kills ({torn} while writing), resumed {resumed} times, {minutes:.1f} minutes")
    assert kills >= len(RUNS)
    assert torn > 0
    assert resumed > 0
