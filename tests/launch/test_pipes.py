"""`python scripts/... | head`: a script whose output nobody reads any more ends without a word, as Unix tools do."""

import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path

import pytest

import flora.results.plots
import flora.training  # noqa: F401  the scripts below import it, once in all where their parent has
from flora.bench import report
from flora.launch.entry import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(capfd):
    """Run an entry point in a process of its own, some of its streams (1, 2) unread: (exit code, stdout, stderr)."""

    def call(entry, unread):
        def process():
            reader, writer = os.pipe()
            os.close(reader)
            for stream in unread:
                os.dup2(writer, stream)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
            entry()

        child = multiprocessing.get_context("fork").Process(target=process)
        child.start()
        child.join(60)
        return child.exitcode, *capfd.readouterr()

    return call


def flora_main(entry):
    main(entry, trace=lambda: False)


@pytest.mark.parametrize("main", [flora_main, report.main])
@pytest.mark.parametrize("lines", [1, 10_000])  # one line breaks as the script ends, many while it prints them
def test_a_closed_pipe_ends_quietly(run, main, lines):
    def status():
        for number in range(lines):
            print("cell", number)

    assert run(lambda: main(status), unread=[1]) == (141, "", "")
    assert run(lambda: main(status), unread=[])[0::2] == (0, "")


def test_an_error_whose_line_is_unread_ends_quietly(run):
    def status():
        raise OSError(28, "No space left on device")

    line = "error: No space left on device: make room and start the same command again to go on\n"
    assert run(lambda: flora_main(status), unread=[]) == (1, "", line)
    assert run(lambda: flora_main(status), unread=[1, 2]) == (141, "", "")


def test_another_broken_pipe_is_an_error(run):
    def status():
        reader, writer = os.pipe()
        os.close(reader)
        os.write(writer, b"to a worker that has died")

    assert run(lambda: flora_main(status), unread=[]) == (1, "", "error: Broken pipe\n")


def test_every_script_ends_quietly(run):
    def help(path):
        sys.argv = [str(path), "--help"]
        runpy.run_path(str(path), run_name="__main__")

    scripts = [ROOT / "train.py", *(ROOT / "scripts").glob("*.py")]
    ends = {path.name: run(lambda path=path: help(path), unread=[1]) for path in scripts}
    assert {name: said for name, (_, _, said) in ends.items() if said} == {}
    assert {code for code, *_ in ends.values()} == {141, -signal.SIGPIPE}  # a shell shows both as 141
