"""Cells one after another in processes that import everything once: the workers of scripts/reproduce.py.

`python -m flora.launch.worker` reads a line of JSON for each cell, its overrides, from stdin, and answers each on
stdout with the exit code of `python train.py OVERRIDES`. What a cell says goes to stderr.
"""

import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from flora.config import composed
from flora.files import ROOT
from flora.launch import mps, preemption, processes
from flora.launch.entry import main
from flora.launch.sweep import visible_gpus
from flora.secrets import unspoken

INTERRUPTED = preemption.BY_HAND


class Worker:
    """A process that runs cells. It starts with the first cell, and anew where the cell before ended it.

    Args:
        gpu: the only GPU that it sees, as CUDA_VISIBLE_DEVICES names it; None: all that this process sees.
        folder: takes a file of what it says.
    """

    def __init__(self, gpu: str | None, folder: Path) -> None:
        places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        inherited = {name: value for name, value in os.environ.items() if name not in processes.ENVIRONMENT}
        self.environment = {**inherited, "PYTHONPATH": os.pathsep.join(places)}
        if gpu is not None:
            self.environment["CUDA_VISIBLE_DEVICES"] = gpu
        handle, name = tempfile.mkstemp(dir=folder, suffix=".log")
        os.close(handle)
        self.log = Path(name)
        self._said = self.log.open("rb")
        self.process: subprocess.Popen[str] | None = None

    def run(self, overrides: Sequence[str]) -> tuple[int, str]:
        """Run a cell; returns its exit code and what it said. A process that dies fails this cell alone."""
        if self.process is None or self.process.poll() is not None:
            self.process = self._start()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._said.seek(0, os.SEEK_END)
        try:
            print(json.dumps(list(overrides)), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        code = int(answer) if answer else self.process.wait() or 1
        said = self._said.read().decode(errors="replace")
        return code, said if code >= 0 else f"{said}\nkilled by signal {-code}: started again the cell goes on"

    def stop(self, at_once: bool) -> None:
        """End the process when its cell is done, or ``at_once``, after a checkpoint at the next step."""
        if self.process is None:
            return
        if at_once:
            self.process.terminate()
        elif self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()

    def _start(self) -> subprocess.Popen[str]:
        with self.log.open("a") as said:
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said}
            command = [sys.executable, "-m", "flora.launch.worker"]
            return subprocess.Popen(command, env=self.environment, text=True, **pipes)


class Pool:
    """Workers that share cells between them, and the visible GPUs in turn."""

    def __init__(self, workers: list[Worker]) -> None:
        self.workers = workers
        self._idle: SimpleQueue[Worker] = SimpleQueue()
        self._stopped = False
        for worker in workers:
            self._idle.put(worker)

    def run(self, overrides: Sequence[str]) -> tuple[int, str]:
        """Run a cell in the next idle worker, from any thread; returns its exit code and what it said."""
        worker = self._idle.get()
        try:
            return (INTERRUPTED, "interrupted") if self._stopped else worker.run(overrides)
        finally:
            self._idle.put(worker)

    def stop(self, at_once: bool) -> None:
        """End all workers; cells that come later are not run."""
        self._stopped = True
        for worker in self.workers:
            worker.stop(at_once)


@contextmanager
def pool(count: int) -> Iterator[Pool]:
    """``count`` workers for the time of a ``with`` block; an exception ends their cells at the next step."""
    gpus = visible_gpus()
    with tempfile.TemporaryDirectory() as folder, mps.shared(count):
        names: Any = islice(cycle(gpus if len(gpus) > 1 else [None]), count)
        workers = Pool([Worker(name, Path(folder)) for name in names])
        try:
            yield workers
        except BaseException:
            workers.stop(at_once=True)
            raise
        workers.stop(at_once=False)


def serve() -> None:
    """Run the cells that stdin names until it ends, or until one ends in an unknown state."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # between cells nothing is on
    asked, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # what a cell prints must not mix with the answers
    train, environment = _train(), dict(os.environ)
    for line in asked:
        code, sound = _run(train, json.loads(line))
        print(code, file=answers, flush=True)
        if not sound:
            sys.exit(code)
        os.environ.clear()
        os.environ.update(environment)
        _tidy()


def _train() -> Any:
    spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@unspoken()
def _run(train: Any, overrides: list[str]) -> tuple[int, bool]:
    """Exit code of a cell, and whether the process may run another: an unforeseen error may leave a GPU unusable."""
    sys.argv = ["train.py", *overrides]  # the record quotes it
    try:
        main(lambda: train.run(composed(overrides), overrides), trace=lambda: "debug=trace" in overrides)
    except SystemExit as end:
        return int(end.code or 0), end.code != INTERRUPTED and not preemption.wanted()
    except Exception:
        traceback.print_exc()
        return 1, False
    return 0, True


def _tidy() -> None:
    """Undo what a cell may have set for its process."""
    import torch

    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    serve()
