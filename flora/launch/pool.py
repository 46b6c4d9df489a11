"""Workers side by side on the visible GPUs, as many at a time as these have room for."""

import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from flora import shared
from flora.launch import mps, room
from flora.launch.sweep import visible_gpus
from flora.launch.worker import INTERRUPTED, Worker


class _Gpu:
    """A GPU, or where there is none the machine.

    Attributes:
        workers: that are to use it.
        on: those of them that run a cell.
        crowded: those of ``on`` that had another beside them.
        room: bytes for all cells, None until one has run alone.
        measured: whether memory decides how many may run, beside the number of workers.
        wanted: by how many cells that are to run alone; others wait.
    """

    def __init__(self, measured: bool) -> None:
        self.workers: list[Worker] = []
        self.on: set[Worker] = set()
        self.crowded: set[Worker] = set()
        self.room: int | None = None
        self.measured, self.wanted = measured, 0

    def most(self, need: int) -> int:
        """Cells that may run side by side, where one takes so many bytes."""
        if not self.measured:
            return len(self.workers)
        return 1 if self.room is None else max(1, min(len(self.workers), self.room // need))

    def take(self) -> Worker:
        """A worker that is idle, for a cell."""
        worker = next(w for w in self.workers if w not in self.on)
        self.on.add(worker)
        if len(self.on) > 1:
            self.crowded |= self.on
        return worker


class Pool:
    """Workers that share cells between them, and the visible GPUs in turn.

    Args:
        workers: at least one.
        measured: whether as many run on a GPU as its memory has room for, by what cells were seen to take: at first
            one; else all, until memory runs out.
    """

    def __init__(self, workers: list[Worker], measured: bool = False) -> None:
        self.workers = workers
        self._changed = threading.Condition()
        self._need = 1  # bytes of a GPU that the largest cell took
        self._stopped = False
        self._gpus: dict[str | None, _Gpu] = {}
        for worker in workers:
            self._gpus.setdefault(worker.gpu, _Gpu(measured)).workers.append(worker)
            worker.heard = partial(self._heard, worker)

    def run(self, overrides: Sequence[str], begin: Callable[[], None] = lambda: None) -> tuple[int, str]:
        """Run a cell when a worker is free for it, from any thread; again, alone, where memory ran out beside others.

        Args:
            overrides: of the cell.
            begin: called when it starts.

        Returns:
            Its exit code, and what it said.
        """
        worker = self._take()
        if worker is None:
            return INTERRUPTED, "interrupted"
        full = crowded = False
        try:
            begin()
            code, said = worker.run(overrides)
            full = worker.full  # now: another cell may take the worker
        finally:
            crowded = self._give(worker)
        if not (full and crowded) or self._stopped:
            return code, said
        with self._alone(self._gpus[worker.gpu], " ".join(overrides)) as alone:
            return (INTERRUPTED, "interrupted") if alone is None else alone.run(overrides)

    def stop(self, at_once: bool) -> None:
        """End all workers; cells that come later are not run."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        _end(self.workers, at_once)

    def pause(self, seconds: float) -> bool:
        """Wait so long; whether the pool was stopped meanwhile."""
        with self._changed:
            return self._changed.wait_for(lambda: self._stopped, timeout=seconds)

    def _take(self) -> Worker | None:
        """A worker that is idle, as soon as a GPU has room for it; None where the pool is stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._open() is not None)
            gpu = None if self._stopped else self._open()
            return None if gpu is None else gpu.take()

    def _open(self) -> _Gpu | None:
        """The GPU with the fewest cells of those that have room for another."""
        able = [g for g in self._gpus.values() if not g.wanted and len(g.on) < g.most(self._need)]
        return min(able, key=lambda gpu: len(gpu.on), default=None)

    @contextmanager
    def _alone(self, gpu: _Gpu, cell: str) -> Iterator[Worker | None]:
        """A worker of a GPU on which no other process is; None where the pool is stopped."""
        worker = None
        with self._changed:
            gpu.measured = True  # from now on memory decides
            gpu.wanted += 1
            print(f"out of memory beside other cells, again alone: {cell}", file=sys.stderr, flush=True)
            self._changed.wait_for(lambda: self._stopped or not gpu.on)
            if not self._stopped:
                worker = gpu.take()
                _end(gpu.workers, at_once=False)  # an idle process takes memory too
        try:
            yield worker
        finally:
            with self._changed:
                gpu.wanted -= 1
            if worker is not None:
                self._give(worker)

    def _give(self, worker: Worker) -> bool:
        """A worker's cell has ended; whether others were on beside it."""
        with self._changed:
            gpu = self._gpus[worker.gpu]
            crowded = worker in gpu.crowded
            gpu.on.discard(worker)
            gpu.crowded.discard(worker)
            self._changed.notify_all()
            return crowded

    def _heard(self, worker: Worker, seen: room.Seen) -> None:
        with self._changed:
            gpu = self._gpus[worker.gpu]
            self._need = max(self._need, seen.need)
            if gpu.on == {worker} and (gpu.room is None or gpu.wanted):  # idle processes would count as well
                gpu.room = seen.room
            self._changed.notify_all()


def _end(workers: Sequence[Worker], at_once: bool) -> None:
    """Stop workers, and wait for all together."""
    for worker in workers:
        worker.stop(at_once)
    for worker in workers:
        worker.wait()


@contextmanager
def pool(count: int | None) -> Iterator[Pool]:
    """``count`` workers for the time of a ``with`` block; an exception ends their cells at the next step.

    None: as many as cores and memory of the visible GPUs allow; one where there is no GPU.
    """
    gpus = visible_gpus()
    asked = (room.by_cores(len(gpus)) * len(gpus) if gpus else 1) if count is None else count
    with tempfile.TemporaryDirectory() as folder, mps.shared(asked), shared.folder():
        names: Any = islice(cycle(gpus if len(gpus) > 1 else [None]), asked)
        workers = Pool([Worker(name, Path(folder)) for name in names], measured=count is None and bool(gpus))
        try:
            yield workers
        except BaseException:
            workers.stop(at_once=True)
            raise
        workers.stop(at_once=False)
