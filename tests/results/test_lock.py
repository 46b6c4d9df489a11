"""Locks: one owner per run, dead owners found out, whatever machine they were on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from flora.errors import AlreadyRunning
from flora.results import Store
from flora.results.lock import Lock, owners

HOLD = """
import sys, time
from flora.results import Store
with Store(sys.argv[1]).lock("abc"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of run abc."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_running_run_is_not_started_twice_and_a_killed_one_can_be_started_at_once(tmp_path, holder):
    store = Store(tmp_path)
    assert store.read_all().state("abc") == "running"
    with pytest.raises(AlreadyRunning, match=f"process {holder.pid} on "), store.lock("abc"):
        pass
    with store.lock("another"):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert store.read_all().state("abc") == "interrupted"
    with store.lock("abc"):
        assert store.read_all().state("abc") == "running"
    assert store.read_all().state("abc") == "missing"
    assert list((tmp_path / ".locks").iterdir()) == []


def plant(tmp_path, age, machine="elsewhere"):
    """The lock of a process on another machine, last touched ``age`` seconds ago."""
    (tmp_path / ".locks").mkdir(exist_ok=True)
    path = tmp_path / ".locks" / "abc.1.lock"
    path.write_text(json.dumps({"token": "theirs", "machine": machine, "host": "node7", "pid": 1, "after_boot": 0.0}))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_an_owner_on_another_machine_lives_as_long_as_its_heartbeat(tmp_path):
    plant(tmp_path, age=50)
    with pytest.raises(AlreadyRunning, match="process 1 on node7"), Lock(tmp_path, "abc", stale_after=60):
        pass
    plant(tmp_path, age=70)
    with Lock(tmp_path, "abc", stale_after=60):
        assert owners(tmp_path)[0]["abc"].generation == 2


def test_a_lock_whose_owner_has_not_written_yet_counts_as_held(tmp_path):
    plant(tmp_path, age=1).write_text("")
    with pytest.raises(AlreadyRunning), Lock(tmp_path, "abc"):
        pass


def test_the_heartbeat_keeps_a_lock_fresh(tmp_path):
    with Lock(tmp_path, "abc", heartbeat=0.05):
        path = owners(tmp_path)[0]["abc"].path
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert time.time() - path.stat().st_mtime < 10


def test_who_was_taken_over_while_stopped_finds_out(tmp_path):
    with Lock(tmp_path, "abc", heartbeat=1000) as mine:
        mine.check()
        path = owners(tmp_path)[0]["abc"].path
        theirs = json.loads(path.read_text()) | {"machine": "elsewhere"}  # as another machine sees it
        path.write_text(json.dumps(theirs))
        os.utime(path, (0, 0))
        with Lock(tmp_path, "abc"), pytest.raises(AlreadyRunning, match="taken over"):
            mine.check()
    assert list((tmp_path / ".locks").iterdir()) == []


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_that_start_together_at_most_one_runs_at_a_time(tmp_path, stale):
    if stale:
        plant(tmp_path, age=1000)
    inside, most, entered, start = [], [], [], threading.Barrier(8)

    def work():
        start.wait()
        try:
            with Lock(tmp_path, "abc"):
                inside.append(1)
                most.append(len(inside))
                entered.append(1)
                time.sleep(0.3)
                inside.pop()
        except AlreadyRunning:
            pass

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert entered
