"""Write requirements.lock, the versions that a fresh install takes today: `python scripts/make_lock.py`.

pip resolves them anew and installs nothing. The lock is of this Python and platform, which its first lines name.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import flora.launch.installed  # noqa: F401

from flora.errors import DataError
from flora.extras import DISTRIBUTION
from flora.files import ROOT
from flora.launch.entry import main

LOCK, EXTRAS = ROOT / "requirements.lock", "dev,slurm,embedded"
HEAD = """\
# The exact versions of an environment in which the tests pass: CPython {python}, {system}, with the extras
# {extras} of pyproject.toml. Made by scripts/make_lock.py. Use it where a run has to be reproduced to the digit:
#   pip install -r requirements.lock && pip install --no-deps -e .
# Records name the sha256 of this file under `lock`; what a run really used stands under `versions`.
"""


def rendered(report: dict) -> str:
    """The lock of what pip reports (``pip install --report``) that it would install."""
    where = report["environment"]
    packages = {p["metadata"]["name"]: p["metadata"]["version"] for p in report["install"]}
    lines = [f"{name}=={version}" for name, version in packages.items() if name != DISTRIBUTION]
    system = f"{where['platform_system']} {where['platform_machine']}"
    head = HEAD.format(python=where["python_version"], system=system, extras=EXTRAS.replace(",", ", "))
    return head + "\n".join(sorted(lines, key=str.lower)) + "\n"


def make_lock() -> None:
    """Ask pip, then write the file."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    asked = ["install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", "-e", f"{ROOT}[{EXTRAS}]"]
    done = subprocess.run([sys.executable, "-m", "pip", *asked], capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no message"]
        raise DataError(f"pip cannot resolve pyproject.toml ({said[-1]})")
    LOCK.write_text(rendered(json.loads(done.stdout)))
    print(Path(LOCK).relative_to(ROOT))


if __name__ == "__main__":
    main(make_lock, trace=lambda: False)
