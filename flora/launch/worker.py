"""Cells one after another in processes that import everything once: the workers of scripts/reproduce.py.

`python -m flora.launch.worker` reads a line of JSON for each cell, its overrides, from stdin, and answers each on
stdout with a line of JSON: ``code``, the exit code of `python train.py OVERRIDES`, ``full``, whether memory ran out,
``ends``, whether the process ends with it, and ``seen``, what it took of its GPU. A long cell says ``seen`` alone
before. What a cell says in words goes to stderr.
"""

import gc
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from flora.config import composed
from flora.errors import OutOfMemory
from flora.files import ROOT
from flora.launch import preemption, processes
from flora.launch.entry import main
from flora.launch.room import Seen, seen
from flora.secrets import unspoken

INTERRUPTED = preemption.BY_HAND
SETTLED = 60.0  # seconds after which a cell has most likely taken what it needs


class Worker:
    """A process that runs cells. It starts with the first cell, and anew where the cell before ended it.

    Args:
        gpu: the only GPU that it sees, as CUDA_VISIBLE_DEVICES names it; None: all that this process sees.
        folder: takes a file of what it says.

    Attributes:
        full: whether memory ran out in the last cell.
        heard: called with what a cell was seen to take of its GPU.
    """

    def __init__(self, gpu: str | None, folder: Path) -> None:
        self.gpu, self.full = gpu, False
        self.heard: Callable[[Seen], None] = lambda seen: None
        places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        inherited = {name: value for name, value in os.environ.items() if name not in processes.ENVIRONMENT}
        self.environment = {**inherited, "PYTHONPATH": os.pathsep.join(places)}
        if gpu is not None:
            self.environment["CUDA_VISIBLE_DEVICES"] = gpu
        handle, name = tempfile.mkstemp(dir=folder, suffix=".log")
        os.close(handle)
        self.log = Path(name)
        self._said = self.log.open("rb")
        self._starting, self._stopped = threading.Lock(), False
        self.process: subprocess.Popen[str] | None = None

    def run(self, overrides: Sequence[str]) -> tuple[int, str]:
        """Run a cell; returns its exit code and what it said. A process that dies fails this cell alone."""
        with self._starting:
            if self._stopped:
                return INTERRUPTED, "interrupted"
            if self.process is None or self.process.poll() is not None:
                self.process = self._start()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._said.seek(0, os.SEEK_END)
        try:
            print(json.dumps(list(overrides)), file=self.process.stdin, flush=True)
            answer = self._answer(self.process.stdout)
        except BrokenPipeError:
            answer = {}
        code, self.full = answer["code"] if answer else self.process.wait() or 1, answer.get("full", False)
        if answer.get("ends"):
            self.process.wait()  # it would take the next cell along
        said = self._said.read().decode(errors="replace")
        return code, said if code >= 0 else f"{said}\nkilled by signal {-code}: started again the cell goes on"

    def stop(self, at_once: bool) -> None:
        """Have the process end when its cell is done, or ``at_once``, after a checkpoint at the next step, for good."""
        with self._starting:
            self._stopped |= at_once
            if self.process is None:
                return
            if at_once:
                self.process.terminate()
            elif self.process.stdin is not None:
                with suppress(BrokenPipeError):  # it was killed, and what it was told is still to be written
                    self.process.stdin.close()

    def wait(self) -> None:
        """Wait for the end of a process that was stopped."""
        if self.process is not None:
            self.process.wait()

    def _answer(self, answers: IO[str]) -> dict[str, Any]:
        """What ends a cell; nothing where its process died."""
        for line in answers:
            answer = json.loads(line)
            if answer["seen"]:
                self.heard(Seen(**answer["seen"]))
            if "code" in answer:
                return answer
        return {}

    def _start(self) -> subprocess.Popen[str]:
        with self.log.open("a") as said:
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said}
            command = [sys.executable, "-m", "flora.launch.worker"]
            return subprocess.Popen(command, env=self.environment, text=True, **pipes)


def serve() -> None:
    """Run the cells that stdin names until it ends, or until one ends in an unknown state."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # between cells nothing is on
    asked, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # what a cell prints must not mix with the answers
    train, environment = _train(), dict(os.environ)

    def say(**answer: Any) -> None:
        found = seen()
        print(json.dumps(answer | {"seen": asdict(found) if found else None}), file=answers, flush=True)

    threading.Thread(target=_end_unheard, args=[answers], daemon=True).start()

    def say_what_is_known() -> None:
        with suppress(Exception):  # the cell goes on, and finds out for itself
            say()

    for line in asked:
        settled = threading.Timer(SETTLED, say_what_is_known)
        settled.daemon = True
        settled.start()
        code, full, sound = _run(train, json.loads(line))
        settled.cancel()
        settled.join()
        try:
            say(code=code, full=full, ends=not sound)
        except RuntimeError:  # CUDA's, after an error that the process does not survive
            print(json.dumps({"code": code, "full": full, "ends": True, "seen": None}), file=answers, flush=True)
            sound = False
        if not sound:
            sys.exit(code)
        os.environ.clear()
        os.environ.update(environment)
        _tidy()
        gc.freeze()  # what is imported: the next cell's collections need not look at it


def _end_unheard(answers: IO[str]) -> None:
    """Stop the cell that is on, with a checkpoint, once the process that reads the answers is gone."""
    poll = select.poll()
    poll.register(answers, 0)  # no event but a reader that has gone
    poll.poll()
    os.kill(os.getpid(), signal.SIGTERM)


def _train() -> Any:
    spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@unspoken()
def _run(train: Any, overrides: list[str]) -> tuple[int, bool, bool]:
    """Exit code of a cell, whether memory ran out, and whether the process may run another.

    An unforeseen error may leave a GPU unusable.
    """
    sys.argv = ["train.py", *overrides]  # the record quotes it
    try:
        main(lambda: train.run(composed(overrides), overrides), trace=lambda: "debug=trace" in overrides)
    except SystemExit as end:
        full = isinstance(end.__context__, OutOfMemory)
        return int(end.code or 0), full, end.code != INTERRUPTED and not preemption.wanted()
    except Exception:
        traceback.print_exc()
        return 1, False, False
    return 0, False, True


def _tidy() -> None:
    """Undo what a cell may have set for its process."""
    import torch

    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    serve()
