"""What every script imports to be launched starts at once, and a strange place to start in ends it in one line."""

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import pytest

import train
from flora.errors import OutOfMemory, enough_memory
from flora.launch import preemption
from flora.launch.entry import main

HEAVY = ("torch", "transformers", "peft", "accelerate", "psutil", "submitit")


def test_launching_imports_no_package_that_takes_long():
    modules = ("entry", "pipes", "preemption", "processes", "sweep", "worker")
    code = "".join(f"import flora.launch.{module}; " for module in modules)
    code += f"import json, sys; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(shown.stdout) == []


@pytest.fixture
def call(script):
    """Run an entry in this process, with a command line: (exit code, stdout, stderr)."""
    return lambda entry, *arguments: script(partial(main, entry, trace=lambda: False), "train.py", *arguments)


SCRIPT = """
import os, sys
from flora.launch.entry import main
def entry():
    print("d\\u00e9", os.getcwd(), sys.argv[1:])
main(entry, trace=lambda: False)
"""
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def test_a_locale_that_knows_ascii_only_takes_other_names(tmp_path):
    folder = tmp_path / "d\u00e9"
    folder.mkdir()
    command = [sys.executable, "-c", SCRIPT, "paths.output=\u65e5"]
    place = {"PYTHONPATH": os.getcwd(), "PYTHONIOENCODING": ""}
    ended = subprocess.run(command, cwd=folder, env=os.environ | ASCII | place, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.decode() == f"d\u00e9 {folder} ['paths.output=\u65e5']\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_closed_stream_takes_no_file_and_ends_nothing(tmp_path, closed):
    code = SCRIPT.replace("print(", "handle = open('file', 'w'); os.write(1, b'raw'); print(")
    command = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code]
    ended = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()}, capture_output=True)
    assert ended.returncode == 0
    assert ended.stderr == b""
    assert (tmp_path / "file").read_text() == ""


def test_a_working_directory_that_is_gone_is_said(tmp_path, monkeypatch, call):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert call(lambda: None)[::2] == (2, "error: the working directory does not exist any more: cd to one that does\n")


def test_a_name_of_other_bytes_than_utf_8_is_refused(call):
    code, _, err = call(lambda: None, "paths.output=a\udcff")
    assert (code, err) == (2, "error: 'paths.output=a\\udcff': the name's bytes are not UTF-8: rename what it names\n")


PLACE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"MASTER_ADDR": None}, "there is no MASTER_ADDR: start the processes with torchrun, or unset RANK"),
        ({"MASTER_PORT": None}, "there is no MASTER_PORT"),
        ({"RANK": None, "WORLD_SIZE": None}, "there is no RANK and no WORLD_SIZE"),
        ({"LOCAL_RANK": None, "WORLD_SIZE": "2"}, "there is no LOCAL_RANK"),
        ({"RANK": "x"}, "RANK=x is not a number"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE=-2 is not a number"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT=x is not a number"),
        ({"RANK": "1"}, "RANK=1 is not below WORLD_SIZE=1"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK=3 is not below WORLD_SIZE=2"),
        ({"WORLD_SIZE": "0"}, "RANK=0 is not below WORLD_SIZE=0"),
        ({"RANK": "\u0662", "WORLD_SIZE": "4"}, "RANK=\u0662 is not a number"),
        ({"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1 is not below the"),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_RANK=1 is above RANK=0"),
        ({"LOCAL_WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE=2 is not between 1 and WORLD_SIZE=1"),
        ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE=x is not a number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
    ],
)
def test_a_place_among_processes_that_cannot_be_is_said(monkeypatch, call, changes, said):
    for name, value in (PLACE | changes).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    code, _, err = call(lambda: None)
    assert code == 2
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1


WAITING = """
import os, signal
from flora.launch import preemption, processes
preemption.install()
import torch, accelerate
processes.start(cpu=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_waits_for_the_other_processes_can_be_ended(tmp_path, number):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = PLACE | {"WORLD_SIZE": "2", "MASTER_PORT": str(port), "PYTHONPATH": os.getcwd()}
    waiting = subprocess.Popen([sys.executable, "-c", WAITING], env=os.environ | place, cwd=tmp_path)
    try:
        while waiting.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        time.sleep(1)  # from listening to waiting
        waiting.send_signal(number)
        assert waiting.wait(60) == -number
    finally:
        waiting.kill()


@pytest.mark.parametrize("names", [(), ("RANK",), ("RANK", "WORLD_SIZE")])
def test_a_number_alone_makes_no_process_one_of_several(monkeypatch, call, names):
    for name in names:
        monkeypatch.setenv(name, PLACE[name])
    assert call(lambda: None)[::2] == (0, "")


@pytest.mark.parametrize("home", ["/proc/no", "/proc/no/further"])
def test_a_home_that_cannot_be_used_is_named(monkeypatch, call, home):
    monkeypatch.setenv("HOME", home)
    code, _, err = call(lambda: os.makedirs(f"{home}/.cache/huggingface"))
    assert code == 2
    assert err.strip().endswith(f"(the home folder {home} cannot be used: set HOME to one that can be written)")


def test_a_full_disk_is_said_with_the_remedy(call):
    def write():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/d/file")

    assert (
        call(write)[2]
        == "error: /d/file: No space left on device: make room and start the same command again to go on\n"
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
)
def test_out_of_memory_is_one_line_whoever_says_it(call, error):
    def ask():
        raise error

    code, _, err = call(ask)
    assert code == OutOfMemory.exit_code
    assert err.startswith("error: out of memory (")
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(errno.ENOENT, "no such file"), KeyError("a")])
def test_another_error_stays_what_it_is(error):
    with pytest.raises(type(error)), enough_memory():
        raise error


def test_ctrl_c_ends_what_is_not_training_at_once_and_once(call):
    def press():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            for _ in range(20):  # while it tidies up
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    code, _, err = call(press)
    assert (code, err) == (preemption.BY_HAND, "interrupted: Ctrl-C; start the same command again to go on\n")
    assert signal.getsignal(signal.SIGINT) is before


FILES = {
    "a tag that names a function": b"a: !!python/object/apply:os.system ['touch evil']\n",
    "an unknown tag": b"a: !thing 1\n",
    "no UTF-8": b"a: \xff\xfe\n",
    "a number": b"7\n",
    "no date": b"a: !!timestamp 2020-99-99\n",
    "a bracket": b"a: [",
    "many brackets": b"[" * 3000,
    "a key twice": b"a: 1\na: 2\n",
    "a null byte": b"a: \x00\n",
    "no reference": b"a: ${\n",
    "no defaults": b"defaults: 7\n",
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_configs_that_cannot_be_read_ends_in_one_line(kind, sandbox, script):
    file = sandbox / "configs" / "local" / "default.yaml"
    file.parent.mkdir(parents=True)
    file.write_bytes(FILES[kind])
    code, _, err = script(
        lambda: main(train.job, trace=lambda: False), "train.py", "--config-dir", sandbox / "configs", "--cfg", "job"
    )
    assert code == 2
    (line,) = err.strip().splitlines()
    assert line.startswith("error: ")
    assert "default" in line or "${" in line, "it names the file, or quotes it"
    assert not list(sandbox.rglob("evil"))
