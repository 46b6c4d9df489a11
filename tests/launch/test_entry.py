"""What every script imports to be launched starts at once."""

import json
import subprocess
import sys

import pytest

import train
from flora.launch.entry import main

HEAVY = ("torch", "transformers", "peft", "accelerate", "psutil", "submitit")


def test_launching_imports_no_package_that_takes_long():
    modules = ("entry", "pipes", "preemption", "processes", "sweep", "worker")
    code = "".join(f"import flora.launch.{module}; " for module in modules)
    code += f"import json, sys; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(shown.stdout) == []


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
