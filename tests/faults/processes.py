"""Faults of the processes that do a run: killed, interrupted, out of memory."""

import contextlib
import json
import os
import signal
import threading
import time

import psutil
import torch

from flora.results import Store
from flora.results.cells import Cell
from scripts import reproduce
from tests.faults.frame import FOLDER, fault
from tests.launch.test_sweep import LAUNCHERS, LONG, TINY, needs, sweeping, wait_for
from tests.tasks.imagefolder.folders import photographs


@fault("out of memory")
def out_of_memory(place):
    return place.run(at=4, do=lambda: torch.empty(1 << 60)), lambda: None


@fault("out of memory on a GPU")
def gpu_out_of_memory(place):
    def ask():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of …")

    return place.run(at=4, do=ask), lambda: None


@fault("Ctrl-C, many times")
def many_interrupts(place):
    def press():
        for _ in range(20):
            os.kill(os.getpid(), signal.SIGINT)

    return place.run("trainer.checkpoint_every=1000", at=4, do=press), lambda: None


@fault("data-loading process killed", slow=True)
def loader_killed(place):
    photographs(place.folder / "data", each=40)
    options = (*FOLDER, f"paths.data={place.folder}/data", "trainer.num_workers=2", "trainer.max_steps=30")

    def kill():
        workers = [child for child in psutil.Process().children() if "forkserver" not in " ".join(child.cmdline())]
        psutil.Process(max(child.pid for child in workers)).kill()

    ended = place.run(*options, at=3, do=kill)
    return ended, lambda: options


def worker_killed(place, launcher):
    needs(launcher)
    log = place.folder / "log"
    seeds = "seed=0" if launcher == "submitit" else "seed=0,1"  # submitit waits for one job after the other
    running = sweeping(place.folder, log, *LONG, seeds, *LAUNCHERS[launcher])
    wait_for(place.checkpoints, running)
    os.kill(json.loads(next(place.results.glob(".locks/*.lock")).read_text())["pid"], signal.SIGKILL)
    code = running.wait(timeout=120)
    for lock in place.results.glob(".locks/*.lock"):  # another cell's process may still be ending
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(json.loads(lock.read_text())["pid"]).kill()
    return (code, log.read_text()), None


@fault("process of a joblib sweep killed", slow=True)
def joblib_killed(place):
    return worker_killed(place, "joblib")


@fault("process of a gpu_pool sweep killed", slow=True)
def gpu_pool_killed(place):
    return worker_killed(place, "gpu_pool")


@fault("process of a submitit sweep killed", slow=True)
def submitit_killed(place):
    return worker_killed(place, "submitit")


@fault("process of `reproduce.py --jobs` killed", slow=True)
def reproduce_killed(place):
    def kill():
        while not place.checkpoints():
            time.sleep(0.01)
        os.kill(json.loads(next(place.results.glob(".locks/*.lock")).read_text())["pid"], signal.SIGKILL)

    cells = [Cell((*TINY, *LONG, f"paths.output={place.outputs}", f"seed={seed}")) for seed in range(1)]
    threading.Thread(target=kill, daemon=True).start()
    place.capsys.readouterr()
    todo = {cell: [f"paths.results={place.results}"] for cell in cells}
    failed = reproduce.run_all(todo, [], 2, Store(place.results))
    return (int(failed == cells), place.capsys.readouterr().err), None
