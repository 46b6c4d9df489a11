"""Workers run cells in warm processes as `python train.py` would; a cell that kills its process fails alone."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from omegaconf import OmegaConf

from flora.files import ROOT
from flora.launch.pool import Pool, pool
from flora.launch.sweep import OneGpu, visible_gpus
from flora.launch.worker import INTERRUPTED, Worker

TINY = (
    *("task=digits", "model=timm", "model.timm_name=resnet10t", "model.pretrained=false", "trainer.max_steps=2"),
    *("trainer.max_eval_examples=16", "trainer.batch_size=8", "adapter=linear_probe", "logger=none"),
)


def cell(folder, *overrides):
    return [*TINY, f"paths.output={folder}/outputs", f"paths.results={folder}/results", *overrides]


def records(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("results/*.json"))]


@pytest.mark.slow
def test_cells_share_a_process_and_a_dead_one_is_replaced(tmp_path):
    with pool(1) as workers:
        worker = workers.workers[0]
        code, said = workers.run(cell(tmp_path, "seed=0", "trainer.deterministic=true"))
        assert code == 0, said
        first = worker.process.pid
        code, said = workers.run(cell(tmp_path, "trainer.lr=-1"))
        assert (code, said.strip().splitlines()[-1][:18]) == (2, "error: trainer.lr ")
        code, said = workers.run(cell(tmp_path, "seed=1", "trainer.dtype=bf16"))
        assert (code, worker.process.pid) == (0, first), said
        assert "seed 0" not in said, "each cell has its own lines"

        os.kill(first, signal.SIGKILL)
        worker.process.wait()
        code, said = workers.run(cell(tmp_path, "seed=0"))
        assert code == 0, said
        assert worker.process.pid != first
        process = worker.process
    assert process.returncode == 0, "it ends with the block"

    done = records(tmp_path)
    assert sorted((r["seed"], r["dtype"], r["status"]) for r in done) == [
        (0, "fp32", "finished"),
        (0, "fp32", "finished"),
        (1, "bf16", "finished"),
    ]
    commands = [record["command"] for record in done]
    assert all(command.startswith("python train.py task=digits ") for command in commands)
    deterministic, plain = (next(r for r in done if r["seed"] == 0 and r["deterministic"] is d) for d in (True, False))
    assert deterministic["value"] == plain["value"]


class Dying(Worker):
    """A worker whose process is killed while its first cell runs."""

    killed = False

    def run(self, overrides):
        if not self.killed:
            self.killed = True
            threading.Thread(target=self._kill).start()
        return super().run(overrides)

    def _kill(self):
        while self.process is None:
            time.sleep(0.01)
        os.kill(self.process.pid, signal.SIGKILL)


def test_a_cell_whose_process_is_killed_fails_alone(tmp_path):
    workers = Pool([Dying(None, tmp_path)])
    code, _ = workers.run(cell(tmp_path))
    assert code == -signal.SIGKILL
    code, said = workers.run(["mode=nonsense"])
    assert code == 2, said
    workers.stop(at_once=False)
    assert workers.run(["mode=nonsense"]) == (130, "interrupted")


STAND_IN = """
import atexit, os, time
from flora.launch import worker

class Train:
    @staticmethod
    def run(cfg, typed):
        if cfg.seed == 1:
            raise ArithmeticError("unforeseen")
        if cfg.seed == 2:
            print("on", flush=True)
            for _ in range(600):
                time.sleep(0.1)

worker._train = lambda: Train
atexit.register(time.sleep, 0.5)  # as CUDA takes some time to end
worker.serve()
"""


class Quick(Worker):
    """A worker whose cells train nothing: that of seed 1 fails, that of seed 2 waits."""

    def _start(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log.open("a")}
        return subprocess.Popen([sys.executable, "-c", STAND_IN], env=self.environment, text=True, **pipes)


def test_the_cell_after_an_unforeseen_error_runs_in_a_new_process(tmp_path):
    worker = Quick(None, tmp_path)
    code, said = worker.run(["seed=1"])
    assert (code, "ArithmeticError: unforeseen" in said) == (1, True)
    assert worker.run(["seed=0"])[0] == 0, "not lost to a process that is about to end"
    worker.stop(at_once=False)
    worker.wait()


def test_all_workers_are_told_to_stop_before_any_is_waited_for(tmp_path):
    workers = [Quick(None, tmp_path) for _ in range(2)]
    threads = [threading.Thread(target=worker.run, args=[["seed=2"]]) for worker in workers]
    for thread in threads:
        thread.start()
    while not all("on\n" in worker.log.read_text() for worker in workers):
        time.sleep(0.05)
    os.kill(workers[0].process.pid, signal.SIGSTOP)  # it takes long to write its checkpoint
    stopping = threading.Thread(target=Pool(workers).stop, args=[True])
    stopping.start()
    threads[1].join(timeout=20)
    ended = not threads[1].is_alive()
    os.kill(workers[0].process.pid, signal.SIGCONT)
    for thread in (stopping, *threads):
        thread.join(timeout=60)
    assert ended


def test_cells_stop_where_the_process_that_started_them_is_killed(tmp_path):
    code = (
        "import sys, threading, time\nfrom pathlib import Path\nfrom tests.launch.test_worker import Quick\n"
        "worker = Quick(None, Path(sys.argv[1]))\nthreading.Thread(target=worker.run, args=[['seed=2']]).start()\n"
        "while 'on\\n' not in worker.log.read_text():\n time.sleep(0.05)\n"
        "print(worker.process.pid, flush=True)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    orphan = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    for _ in range(200):
        if not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.1)
    else:
        orphan.kill()
        raise AssertionError("the cell goes on, and nobody hears of it")
    (log,) = tmp_path.glob("*.log")
    assert "interrupted: the signal SIGTERM asked it to stop" in log.read_text()


def test_a_stopped_worker_starts_no_process_for_a_cell_that_it_was_just_given(tmp_path):
    worker = Worker(None, tmp_path)
    Pool([worker]).stop(at_once=True)
    assert worker.run(["mode=nonsense"]) == (INTERRUPTED, "interrupted")
    assert worker.process is None


def test_a_worker_that_was_killed_while_it_was_told_of_a_cell_stops_in_peace(tmp_path, monkeypatch):
    worker = Quick(None, tmp_path)
    worker.process = worker._start()
    os.kill(worker.process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.process.pid, os.WEXITED | os.WNOWAIT)
    with monkeypatch.context() as before:
        before.setattr(worker.process, "poll", lambda: None)  # it was asked a moment earlier
        assert worker.run(["seed=0"])[0] == -signal.SIGKILL
    worker.stop(at_once=False)


@pytest.mark.slow
def test_a_preempted_cell_goes_on_in_a_new_process(tmp_path):
    def tell():
        while not list(tmp_path.glob("outputs/*/checkpoints/[0-9]*")):
            time.sleep(0.01)
        os.kill(worker.process.pid, signal.SIGTERM)

    asked = cell(tmp_path, "trainer.max_steps=40", "trainer.checkpoint_every=1")
    with pool(1) as workers:
        worker = workers.workers[0]
        threading.Thread(target=tell, daemon=True).start()
        code, said = workers.run(asked)
        assert (code, worker.process.wait()) == (75, 75), said
        assert [record["status"] for record in records(tmp_path)] == ["interrupted"]
        code, said = workers.run(asked)
        assert code == 0, said
        assert "going on from checkpoint" in said
    assert [record["status"] for record in records(tmp_path)] == ["finished"]


def test_an_exception_ends_the_workers_at_once(tmp_path):
    def interrupted():
        with pool(1) as workers:
            started.append(threading.Thread(target=workers.run, args=(cell(tmp_path),)))
            started[0].start()
            while workers.workers[0].process is None:
                time.sleep(0.01)
            started.append(workers.workers[0].process)
            raise KeyboardInterrupt

    started = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    thread, process = started
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert process.returncode != 0


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("3", ["3"]),
        ("0,2", ["0", "2"]),
        ("0, 2,-1,3", ["0", "2"]),
        ("GPU-a,GPU-b", ["GPU-a", "GPU-b"]),
    ],
)
def test_workers_take_the_visible_gpus_in_turn(monkeypatch, named, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == expected
    with pool(3) as workers:
        seen = [worker.environment["CUDA_VISIBLE_DEVICES"] for worker in workers.workers]
    assert seen == ([expected[0], expected[1], expected[0]] if len(expected) > 1 else [named] * 3)


def test_the_processes_of_a_sweep_take_the_gpus_in_turn_and_keep_theirs(monkeypatch):
    seen = []
    for first in range(3):  # three processes, each with a second job
        monkeypatch.setattr(OneGpu, "_chosen", False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
        for number in (first, first + 3):
            OneGpu().on_job_start(OmegaConf.create({"hydra": {"job": {"num": number}}}))
            seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["4", "4", "6", "6", "4", "4"]
