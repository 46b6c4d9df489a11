"""Shared fixtures. The hub is offline: nothing here may depend on it."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores; the children of a test inherit it

import pytest
import torch


@pytest.fixture
def script(monkeypatch, capsys):
    """Run a script in this process, given what runs it and its command line: (exit code, stdout, stderr)."""

    def call(run, *command):
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        capsys.readouterr()
        try:
            run()
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """Skip, with a reason, what this machine lacks."""
    for item in items:
        if "data" in item.keywords and not os.environ.get("FLORA_DATA"):
            item.add_marker(pytest.mark.skip(reason="FLORA_DATA names no data folder"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
