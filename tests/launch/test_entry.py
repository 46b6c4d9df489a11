"""What every script imports to be launched starts at once."""

import json
import subprocess
import sys

HEAVY = ("torch", "transformers", "peft", "accelerate", "psutil", "submitit")


def test_launching_imports_no_package_that_takes_long():
    modules = ("entry", "pipes", "preemption", "processes", "sweep", "worker")
    code = "".join(f"import flora.launch.{module}; " for module in modules)
    code += f"import json, sys; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(shown.stdout) == []
