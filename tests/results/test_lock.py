"""Locks: one owner per run, dead owners found out, whatever machine they were on."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from flora.errors import AlreadyRunning, CheckpointError
from flora.results import Store, lock
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


def test_a_lock_of_the_future_is_fresh_no_longer_than_one_of_now(tmp_path):
    path = plant(tmp_path, age=-(10**8))
    with pytest.raises(AlreadyRunning, match="process 1 on node7"), Lock(tmp_path, "abc", stale_after=0.1):
        pass
    assert path.stat().st_mtime < time.time() + 1
    time.sleep(0.2)
    with Lock(tmp_path, "abc", stale_after=0.1):
        assert not path.exists()


def test_after_the_last_generation_nobody_has_the_run(tmp_path):
    last = plant(tmp_path, age=10**6)
    last = last.rename(last.with_name("abc.999999999.lock"))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"abc.999999999.lock: .* delete it and start again"):
            Lock(tmp_path, "abc").__enter__()
    assert list((tmp_path / ".locks").iterdir()) == [last]


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


def own_lock(tmp_path, age=600, **changes):
    """The lock of a process on this machine, by default this one, last touched ``age`` seconds ago."""
    path = plant(tmp_path, age)
    path.write_text(json.dumps(lock._written("theirs") | changes))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_a_process_of_this_machine_lives_however_old_its_lock_is(tmp_path):
    own_lock(tmp_path)
    with pytest.raises(AlreadyRunning, match=f"process {os.getpid()} on "), Lock(tmp_path, "abc"):
        pass


def test_a_clock_that_was_set_while_a_machine_slept_kills_nobody(tmp_path, monkeypatch):
    own_lock(tmp_path)
    hours, create_time, boot_time = 9 * 3600, psutil.Process.create_time, psutil.boot_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: create_time(self) + hours)
    monkeypatch.setattr(psutil, "boot_time", lambda: boot_time() + hours)
    assert owners(tmp_path)[0]["abc"].alive


def test_a_suspended_owner_is_said_to_be_one(tmp_path, holder):
    os.kill(holder.pid, signal.SIGSTOP)
    while psutil.Process(holder.pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    with (
        pytest.raises(AlreadyRunning, match=f"process {holder.pid} on .*, which is suspended: "),
        Lock(tmp_path, "abc"),
    ):
        pass


def test_a_number_that_was_given_again_and_a_process_nobody_waited_for_are_no_owners(tmp_path):
    own_lock(tmp_path, age=1, after_boot=lock._after_boot(psutil.Process()) - 60)
    assert not owners(tmp_path)[0]["abc"].alive
    ended = subprocess.Popen(["true"])
    while (process := psutil.Process(ended.pid)).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    own_lock(tmp_path, age=1, pid=ended.pid, after_boot=lock._after_boot(process))
    assert not owners(tmp_path)[0]["abc"].alive
    ended.wait()


ODD = {
    "abc.1.lock": lambda path: path.write_text("[1]"),
    "abc.2.lock": lambda path: path.write_text("[" * 100_000),
    "abc.3.lock": lambda path: path.mkdir(),
    "abc.4.lock": lambda path: path.symlink_to("nowhere"),
    "abc.5.lock": os.mkfifo,
    "abc.6.lock": lambda path: path.write_text('{"token": 1, "machine": [], "pid": "x"}'),
    "abc.1 (conflicted copy).lock": lambda path: path.write_text("{}"),
    "abc.lock": lambda path: path.write_text("{}"),
    "abc.x.lock": lambda path: path.write_text("{}"),
    "abc.\udcff.lock": lambda path: path.write_text("{}"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_entry_is_reported_and_left_out(tmp_path, name, capsys):
    path = tmp_path / ".locks" / name
    path.parent.mkdir()
    ODD[name](path)
    if not path.is_symlink():
        os.utime(path, (0, 0))
    contents = Store(tmp_path).read_all()
    (problem,) = contents.problems
    assert problem.encode().startswith(f"{tmp_path}/.locks/abc.".encode())
    assert contents.state("abc") in ("missing", "interrupted")
    with Lock(tmp_path, "abc"):
        assert owners(tmp_path)[0]["abc"].alive
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"warning: left out: {problem}"


def test_a_lock_that_cannot_be_written_whole_is_removed(tmp_path, monkeypatch):
    def full(content, file):
        file.write("{")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lock.json, "dump", full)
    with pytest.raises(CheckpointError, match=r"abc.1.lock cannot be written .No space left.*make room"):
        Lock(tmp_path, "abc").__enter__()
    assert list((tmp_path / ".locks").iterdir()) == []


def test_the_heart_of_a_process_that_was_taken_over_beats_no_more(tmp_path):
    with Lock(tmp_path, "abc", heartbeat=0.01) as mine:
        mine.path.write_text(json.dumps(lock._written("theirs")))
        (beat,) = [t for t in threading.enumerate() if t.name == "heartbeat abc"]
        beat.join(10)
        assert not beat.is_alive()
    assert mine.path.exists(), "it is another's"


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
