"""Dependencies: each is used and bounded, and the lock file is of versions within the bounds."""

import hashlib
import re
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from flora.results.record import lock_digest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = [Requirement(text) for text in PROJECT["dependencies"]]
EVERY = REQUIRED + [Requirement(text) for extra in PROJECT["optional-dependencies"].values() for text in extra]

# Used without an import of ours: who imports it, and the words of ours that make it do so.
INDIRECT = {
    "accelerate": (r"import .*\bTrainer\b|transformers\.Trainer\b", "transformers' Trainer runs on it"),
    "hydra-joblib-launcher": (r"hydra/launcher: joblib", "a plugin that Hydra finds"),
    "nvidia-ml-py": (r"torch\.cuda\.utilization\(", "torch asks it how busy a GPU is"),
}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def ours():
    files = [ROOT / "train.py", *(ROOT / "flora").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    return "\n".join(path.read_text() for path in (*files, *(ROOT / "configs").rglob("*.yaml")))


@pytest.mark.parametrize("dependency", [requirement.name for requirement in REQUIRED])
def test_a_dependency_is_used(dependency):
    if dependency in INDIRECT:
        words, why = INDIRECT[dependency]
        assert re.search(words, ours()), f"nothing needs {dependency} any more ({why})"
        return
    modules = [m for m, names in packages_distributions().items() if normal(dependency) in map(normal, names)]
    assert modules, f"{dependency} is not installed"
    assert any(re.search(rf"^\s*(import|from) {re.escape(module)}\b", ours(), re.MULTILINE) for module in modules)


def test_every_dependency_has_a_lower_and_an_upper_bound():
    for requirement in EVERY:
        kinds = {bound.operator for bound in requirement.specifier}
        assert kinds >= {">=", "<"} or kinds == {"=="}, requirement


def test_the_lock_file_is_exact_and_within_the_bounds():
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    locked = {normal(name): version for name, version in (line.split("==") for line in lines)}
    assert "flora" not in locked
    for requirement in REQUIRED:
        assert requirement.specifier.contains(locked[normal(requirement.name)]), requirement


def test_records_name_the_lock_file():
    assert lock_digest() == hashlib.sha256((ROOT / "requirements.lock").read_bytes()).hexdigest()
