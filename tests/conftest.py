"""Shared fixtures. The hub is offline: nothing here may depend on it."""

import contextlib
import gc
import os
import resource
import sys
from importlib import metadata
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores; the children of a test inherit it

import pytest
import torch

gc.disable()  # until all tests are imported: none of that is garbage

FEW = 50  # modules
MEMORY = 24 << 30  # of addresses: a hostile config may ask for more than the machine has


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


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """A folder to work in, a home and a cache, all below one that is watched; memory is bounded."""
    for name in ("work", "home", "cache"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, limits[1]))
    yield tmp_path
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


_set_apart = 0  # how many modules were imported then


def pytest_collection_finish():
    """Imported objects are no garbage: they are set apart, so that no collection looks at them."""
    gc.enable()
    _set_imports_apart()


def pytest_runtest_setup():
    """What a test before has imported is set apart as well: each training asks for a full collection."""
    if len(sys.modules) > _set_apart + FEW:
        _set_imports_apart()


def _set_imports_apart():
    global _set_apart
    gc.collect()
    gc.freeze()
    _set_apart = len(sys.modules)


def pytest_report_header():
    """Where this environment is not that of requirements.lock: tests are to pass in both."""
    lines = (Path(__file__).parents[1] / "requirements.lock").read_text().splitlines()
    differing = []
    for name, version in (line.split("==") for line in lines if not line.startswith("#")):
        with contextlib.suppress(metadata.PackageNotFoundError):
            if (there := metadata.version(name)) != version:
                differing.append(f"{name} {there} (locked: {version})")
    return f"requirements.lock: {', '.join(differing) or 'these versions'}"


def pytest_collection_modifyitems(items):
    """Skip, with a reason, what this machine lacks."""
    for item in items:
        # Keywords hold the names of folders too, so that a checkout in "data" or "gpu" would skip all.
        if item.get_closest_marker("data") and not os.environ.get("FLORA_DATA"):
            item.add_marker(pytest.mark.skip(reason="FLORA_DATA names no data folder"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
