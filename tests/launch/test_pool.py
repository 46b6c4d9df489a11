"""As many cells run side by side as a GPU has room for; one that finds too little memory runs again, alone."""

import threading
from collections import defaultdict

import pytest

from flora.config import composed
from flora.errors import OutOfMemory
from flora.launch import room, worker
from flora.launch.pool import Pool, pool
from flora.launch.room import Seen

GB = 1 << 30


class Gpus:
    """GPUs of so many bytes, on which cells take what their first word says, in GB, until they are let go."""

    def __init__(self, size):
        self.size = size
        self.on = defaultdict(dict)  # worker: bytes, by GPU
        self.ran = []
        self.changed = threading.Condition()
        self.let_go = set()

    def await_on(self, count, gpu=None):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.on[gpu]) == count, timeout=30), len(self.on[gpu])

    def let(self, count, gpu=None):
        """Let so many of those that are on end, and wait until they have."""
        with self.changed:
            chosen = set(list(self.on[gpu])[:count])
            assert len(chosen) == count
            self.let_go |= chosen
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: not self.let_go, timeout=30)


class Fake:
    """A worker without a process."""

    def __init__(self, gpus, gpu=None):
        self.gpus, self.gpu, self.full, self.stopped = gpus, gpu, False, 0

    def run(self, overrides):
        need = int(overrides[0]) * GB
        with self.gpus.changed:
            on = self.gpus.on[self.gpu]
            on[self] = need
            self.gpus.ran.append((overrides, len(on)))
            self.full = sum(on.values()) > self.gpus.size
            self.gpus.changed.notify_all()
            if not self.full:
                assert self.gpus.changed.wait_for(lambda: self in self.gpus.let_go, timeout=30)
            free = self.gpus.size - sum(on.values()) + need
        self.heard(Seen(need, free))
        with self.gpus.changed:
            del on[self]
            self.gpus.let_go.discard(self)
            self.gpus.changed.notify_all()
        return (1, "error: out of memory") if self.full else (0, "finished")

    def stop(self, at_once):
        self.stopped += 1

    def wait(self):
        """Idle."""


def started(workers, *cells):
    """Threads that each run a cell, and the exit codes of those that have ended."""
    codes = []
    threads = [threading.Thread(target=lambda c=c: codes.append(workers.run(c)[0])) for c in cells]
    for thread in threads:
        thread.start()
    return threads, codes


def ended(threads):
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_the_first_cell_runs_alone_and_then_as_many_as_memory_allows():
    gpus = Gpus(10 * GB)
    workers = Pool([Fake(gpus) for _ in range(8)], measured=True)
    threads, codes = started(workers, *[["3"]] * 7)
    gpus.await_on(1)
    gpus.let(1)
    for _ in range(2):
        gpus.await_on(3)  # 3 GB each of 10
        gpus.let(3)
    ended(threads)
    assert codes == [0] * 7
    assert max(beside for _, beside in gpus.ran) == 3


def test_a_cell_that_is_still_on_tells_what_it_takes():
    gpus = Gpus(10 * GB)
    workers = Pool([Fake(gpus) for _ in range(2)], measured=True)
    threads, _ = started(workers, ["3"], ["3"])
    gpus.await_on(1)
    (first,) = gpus.on[None]
    first.heard(Seen(3 * GB, 10 * GB))
    gpus.await_on(2)
    gpus.let(2)
    ended(threads)


def test_each_gpu_has_room_of_its_own_and_the_emptier_one_is_taken():
    gpus = Gpus(10 * GB)
    workers = Pool([Fake(gpus, name) for _ in range(3) for name in "01"], measured=True)
    threads, _ = started(workers, *[["4"]] * 6)
    gpus.await_on(1, "0")
    gpus.await_on(1, "1")
    for name in "01":
        gpus.let(1, name)
    for name in "01":
        gpus.await_on(2, name)
    for name in "01":
        gpus.let(2, name)
    ended(threads)


def test_more_workers_than_memory_allows_are_found_out_and_the_cell_runs_again_alone(capsys):
    gpus = Gpus(10 * GB)
    fakes = [Fake(gpus) for _ in range(3)]
    workers = Pool(fakes)  # as --jobs 3 asks
    threads, codes = started(workers, ["4", "a=1"], ["4", "b=1"])
    gpus.await_on(2)
    more, others = started(workers, ["4", "c=1"])
    while not capsys.readouterr().err.startswith("out of memory beside other cells, again alone: 4 c=1"):
        pass
    gpus.let(1)
    gpus.await_on(1)
    late, last = started(workers, ["4", "d=1"])
    assert gpus.ran[-1][0] == ["4", "c=1"], "nothing starts while it waits"
    gpus.let(1)
    gpus.await_on(1)
    assert gpus.ran[-1] == (["4", "c=1"], 1)
    assert all(fake.stopped for fake in fakes), "idle processes hold memory too"
    gpus.let(1)
    gpus.await_on(1)
    gpus.let(1)
    ended([*threads, *more, *late])
    assert (sorted(codes), others, last) == ([0, 0], [0], [0])
    threads, codes = started(workers, *[["4"]] * 3)
    gpus.await_on(2)  # three did not fit
    gpus.let(2)
    gpus.await_on(1)
    gpus.let(1)
    ended(threads)
    assert codes == [0, 0, 0]


def test_what_ran_out_of_memory_is_known_though_another_cell_has_taken_the_worker(monkeypatch):
    gpus = Gpus(10 * GB)
    fakes = [Fake(gpus), Fake(gpus)]
    workers = Pool(fakes)
    give = workers._give

    def given(worker):
        crowded = give(worker)
        worker.full = False  # as the next cell found
        return crowded

    monkeypatch.setattr(workers, "_give", given)
    threads, codes = started(workers, ["6"])
    gpus.await_on(1)
    more, others = started(workers, ["6"])
    while len(gpus.ran) < 2:
        pass
    gpus.let(1)
    gpus.await_on(1)
    gpus.let(1)
    ended([*threads, *more])
    assert (codes, others) == ([0], [0])


def test_a_cell_too_large_for_the_whole_gpu_fails_at_once():
    gpus = Gpus(10 * GB)
    assert Pool([Fake(gpus)], measured=True).run(["11"]) == (1, "error: out of memory")
    assert len(gpus.ran) == 1


def test_a_stopped_pool_lets_no_one_wait():
    gpus = Gpus(10 * GB)
    workers = Pool([Fake(gpus), Fake(gpus)], measured=True)
    threads, codes = started(workers, ["3"], ["3"])
    gpus.await_on(1)
    workers.stop(at_once=False)
    gpus.let(1)
    ended(threads)
    assert sorted(codes) == [0, worker.INTERRUPTED]


@pytest.mark.parametrize(
    ("cores", "gpus", "cells"), [(16, 1, 15), (128, 8, 15), (128, 4, 16), (2, 1, 1), (1, 2, 1), (8, 2, 3)]
)
def test_a_cell_takes_a_core_and_one_is_left(monkeypatch, cores, gpus, cells):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    assert room.by_cores(gpus) == cells


def test_without_a_gpu_cells_run_one_after_another(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pool(None) as workers:
        assert len(workers.workers) == 1


def test_on_gpus_there_is_a_worker_for_each_core_but_one(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    with pool(None) as workers:
        assert [w.gpu for w in workers.workers] == ["0", "1"] * 3


def test_a_worker_says_that_memory_ran_out():
    class Train:
        @staticmethod
        def run(cfg, typed):
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    assert worker._run(Train, ["task=digits"]) == (OutOfMemory.exit_code, True, True)
    assert composed(["task=digits"]).task.name == "digits"
    assert worker._run(Train, ["mode=nonsense_", "task=nothing"])[:2] == (2, False)
