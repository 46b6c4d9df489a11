"""A process that was stopped, and one that started the same run meanwhile: the record is right, whoever ends it."""

import json
import os
import random
import signal
import time

import pytest

from tests.training.test_torture import processes, result, start  # noqa: F401

RUN = ("adapter=linear_probe", "trainer.batch_size=8", "trainer.checkpoint_every=3", "trainer.max_steps=60")


def wait(what, process):
    while not what():
        assert process.is_alive(), "it ended too early"
        time.sleep(0.002)


def trial(context, folder, elsewhere, chance):
    """Stop a run at a checkpoint, make its lock ten minutes old, start it again, let the first go on.

    Args:
        context: starts processes.
        folder: of the run.
        elsewhere: the lock looks like one of another machine, of whose processes nobody here knows.
        chance: chooses the moment.

    Returns:
        Exit codes of the first process and the second, and what both said.
    """
    first = start(context, folder, RUN)
    number = chance.randrange(1, 9)
    wait(lambda: any((folder / "outputs").glob(f"*/checkpoints/{number}")), first)
    time.sleep(chance.uniform(0, 0.02))
    os.kill(first.pid, signal.SIGSTOP)
    (lock,) = (folder / "results" / ".locks").glob("*.lock")
    if elsewhere:
        lock.write_text(json.dumps(json.loads(lock.read_text()) | {"machine": "elsewhere"}))
    os.utime(lock, (time.time() - 600,) * 2)
    said = folder / "said.log"
    before = said.stat().st_size
    second = start(context, folder, RUN)
    try:
        if elsewhere:
            wait(lambda: "going on from checkpoint" in said.read_text()[before:], second)
        else:
            second.join()
    finally:
        os.kill(first.pid, signal.SIGCONT)
        first.join()
        second.join()
    return first.exitcode, second.exitcode, said.read_text()


@pytest.fixture(scope="module")
def calm(processes, tmp_path_factory):  # noqa: F811
    """What the run comes to when it is left alone."""
    folder = tmp_path_factory.mktemp("calm")
    process = start(processes, folder, RUN)
    process.join()
    assert process.exitcode == 0, (folder / "said.log").read_text()
    return result(folder)


def test_a_stopped_process_of_this_machine_keeps_its_run(processes, calm, tmp_path):  # noqa: F811
    first, second, said = trial(processes, tmp_path, False, random.Random(0))
    assert (first, second) == (0, 75), said
    assert "error: run " in said
    assert "which is suspended: wait for it, or stop it first" in said
    assert result(tmp_path) == calm


def test_one_that_another_machine_took_over_stops_and_writes_nothing(processes, calm, tmp_path):  # noqa: F811
    first, second, said = trial(processes, tmp_path, True, random.Random(0))
    assert (first, second) == (75, 0), said
    assert said.count("was taken over by another process while this one had stopped") == 1
    assert "Traceback" not in said
    assert result(tmp_path) == calm
    assert list(tmp_path.rglob(".*.tmp")) == list((tmp_path / "results" / ".locks").iterdir()) == []
