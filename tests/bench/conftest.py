"""Running a benchmark script in this process."""

from functools import partial

import pytest

from flora.bench.report import main


@pytest.fixture
def run(script):
    """Run a script's entry point with arguments: (exit code, stdout, stderr)."""

    def call(entry, *arguments):
        return script(partial(main, entry), "scripts/bench.py", *arguments)

    return call
