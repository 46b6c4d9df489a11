"""Where a run of train.py and a fault of it happen in this process, and a disk that can be full."""

import contextlib
import json
import subprocess
import sys

import pytest

import train
from flora.launch.entry import main
from tests.launch.test_sweep import TINY

QUICK = (*TINY, "model.image_size=32", "trainer.max_steps=6", "trainer.checkpoint_every=1", "trainer.device=cpu")


class Place:
    """Where a run and its fault happen."""

    def __init__(self, folder, monkeypatch, capsys):
        self.folder, self.patch, self.capsys = folder, monkeypatch, capsys
        self.outputs, self.results = folder / "outputs", folder / "results"

    def command(self, *overrides):
        """The overrides of a run; the last one of a key wins."""
        places = (f"paths.output={self.outputs}", f"paths.results={self.results}")
        return list({override.split("=")[0]: override for override in (*QUICK, *places, *overrides)}.values())

    def run(self, *overrides, at=None, do=None):
        """Exit code and stderr of train.py in this process; ``do`` happens after step ``at``."""

        def step(callback, args, state, control, **kwargs):
            if state.global_step == at:
                do()

        with self.patch.context() as patch:
            patch.setattr("flora.training.callbacks.StepMeter.on_step_end", step, raising=False)
            patch.setattr(sys, "argv", ["train.py", *self.command(*overrides)])
            self.capsys.readouterr()
            try:
                main(train.job, trace=lambda: False)
                code = 0
            except SystemExit as end:
                code = end.code
        return code, self.capsys.readouterr().err

    def checkpoints(self):
        """Whole ones, oldest first."""
        return sorted(self.outputs.glob("*/checkpoints/[0-9]*"), key=lambda path: int(path.name))

    def records(self):
        return [json.loads(path.read_text()) for path in self.results.glob("*.json")]


@contextlib.contextmanager
def disk(folder, options):
    """A file system of its own in memory; skips where that is not allowed."""
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder):
    """Leave no byte free."""
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
