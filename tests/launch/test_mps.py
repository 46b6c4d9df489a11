"""CUDA's multi-process service starts with a sweep that shares GPUs and ends with it, also after a kill."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from flora.files import ROOT
from flora.launch import mps
from flora.launch.pool import pool

# Writes what it is asked to a log; runs while there is a file in the folder that the environment names.
PROGRAM = """#!/bin/sh
flag="${CUDA_MPS_PIPE_DIRECTORY:-$HOME/nvidia-mps}/control"
if [ "$1" = "-d" ]; then
    [ -n "$BROKEN" ] && echo "$BROKEN" && exit 1
    echo "start ${CUDA_VISIBLE_DEVICES-all}" >> "$LOG"
    touch "$flag"
    exit 0
fi
read -r asked
echo "$asked" >> "$LOG"
[ -e "$flag" ] || exit 1
[ "$asked" = quit ] && rm "$flag"
exit 0
"""


@pytest.fixture
def service(tmp_path, monkeypatch):
    """A stand-in for the program of CUDA, on a machine with two GPUs; returns its log's lines when called."""
    program, log = tmp_path / "bin" / mps.CONTROL, tmp_path / "log"
    program.parent.mkdir()
    program.write_text(PROGRAM)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FLORA_CACHE", raising=False)
    monkeypatch.setenv("LOG", str(log))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    for name in mps.FOLDERS:
        monkeypatch.delenv(name, raising=False)
    return lambda: log.read_text().splitlines() if log.exists() else []


def test_workers_that_share_gpus_have_the_service(service):
    with pool(3) as workers:
        assert service() == ["get_server_list", "start all"], "numbers of GPUs are those of the machine"
        folders = {worker.environment["CUDA_MPS_PIPE_DIRECTORY"] for worker in workers.workers}
        assert len(folders) == 1
    assert service()[2:] == ["quit"]
    assert not any(os.path.exists(folder) for folder in folders)
    assert not any(name in os.environ for name in mps.FOLDERS)


def test_a_killed_pool_leaves_no_service_and_the_next_one_removes_its_images(service):
    code = (
        "import os, time\nfrom flora.launch.pool import pool\nwith pool(4):\n"
        " print(os.environ['FLORA_SHARED'], flush=True)\n print(os.environ['CUDA_MPS_PIPE_DIRECTORY'], flush=True)\n"
        " time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    images, pipes = (Path(process.stdout.readline().strip()) for _ in range(2))
    assert images.is_dir()
    assert pipes.is_dir()
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(100):
        if not pipes.exists():
            break
        time.sleep(0.1)
    assert service() == ["get_server_list", "start all", "quit"]
    assert not pipes.exists()
    assert images.is_dir()
    with pool(1):
        assert not images.exists()


def test_the_service_ends_with_a_sweep_that_hands_a_signal_on_to_its_processes(service):
    code = (
        "import os, signal\nfrom flora.launch import mps, preemption\npreemption.install()\npreemption.forward()\n"
        "with mps.shared(3):\n os.kill(os.getpid(), signal.SIGTERM)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert service() == ["get_server_list", "start all", "quit"]


@pytest.mark.parametrize(
    ("processes", "gpus"),
    [(2, "2,3"), (4, ""), (4, "-1"), (4, "MIG-a,MIG-b")],
    ids=["a GPU each", "no GPU", "none by number", "parts"],
)
def test_where_no_whole_gpu_is_shared_nothing_starts(service, monkeypatch, processes, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    with mps.shared(processes) as on:
        assert not on
    assert service() == []


def test_a_service_that_runs_is_left_alone(service, tmp_path):
    (tmp_path / "nvidia-mps").mkdir()
    (tmp_path / "nvidia-mps" / "control").touch()
    with mps.shared(4) as on:
        assert not on
        assert not any(name in os.environ for name in mps.FOLDERS)
    assert service() == ["get_server_list"]


def test_one_that_does_not_start_is_said_and_the_sweep_goes_on(service, monkeypatch, capsys):
    monkeypatch.setenv("BROKEN", "An instance of this daemon is already running")
    with mps.shared(4) as on:
        assert not on
    assert capsys.readouterr().err == (
        "warning: nvidia-cuda-mps-control: An instance of this daemon is already running: runs on one GPU take turns\n"
    )


def test_without_the_program_nothing_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("PATH", str(tmp_path))
    with mps.shared(4) as on:
        assert not on
    assert capsys.readouterr().err == ""


def test_a_sweep_of_the_launcher_has_it(service):
    launcher = OmegaConf.load(ROOT / "configs/launcher/gpu_pool.yaml")
    assert launcher.hydra.callbacks.mps["_target_"] == "flora.launch.mps.Service"
    callback, config = mps.Service(), OmegaConf.create({"workers": 3})
    callback.on_multirun_start(config)
    assert os.path.exists(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
    pickle.loads(pickle.dumps(callback)).on_multirun_end(config)  # joblib sends it to its processes
    assert service() == ["get_server_list", "start all"]
    callback.on_multirun_end(config)
    assert service() == ["get_server_list", "start all", "quit"]
