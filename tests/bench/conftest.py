"""Running a benchmark script in this process."""

import sys

import pytest

from flora.bench.report import main


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script's entry point with arguments: (exit code, stdout, stderr)."""

    def call(entry, *arguments):
        monkeypatch.setattr(sys, "argv", ["scripts/bench.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            main(entry)
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call
