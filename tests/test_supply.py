"""Dependencies: each is used and bounded, and the lock file is of versions within the bounds."""

import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from flora.results.record import lock_digest
from scripts.make_lock import EXTRAS, rendered

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRA = PROJECT["optional-dependencies"]
REQUIRED = [Requirement(text) for text in PROJECT["dependencies"] + EXTRA["suite"] + EXTRA["lycoris"]]
EVERY = REQUIRED + [Requirement(text) for texts in EXTRA.values() for text in texts if PROJECT["name"] not in text]

# Used without an import of ours: who imports it, and the words of ours that make it do so.
INDIRECT = {
    "accelerate": (r"import .*\bTrainer\b|transformers\.Trainer\b", "transformers' Trainer runs on it"),
    "hydra-joblib-launcher": (r"hydra/launcher: joblib", "a plugin that Hydra finds"),
    "sentencepiece": (r"transformers\.AutoTokenizer\b", "transformers reads spm.model and tokenizer.model with it"),
    "protobuf": (r"transformers\.AutoTokenizer\b", "transformers reads spm.model only where it is there as well"),
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


def locked():
    """Versions by name, of the lock file."""
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    return {normal(name): version for name, version in (line.split("==") for line in lines)}


def wanted(requirement, extras=()):
    """Whether it is a dependency on this platform, of a package that is asked for with these extras."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def unmet(requirement, versions):
    version = versions.get(normal(requirement.name))
    return version is None or not requirement.specifier.contains(version, prereleases=True)


def of(extras):
    """What extras ask for, through each other too."""
    needs = [Requirement(text) for extra in extras for text in EXTRA[extra]]
    own = {extra for need in needs if need.name == PROJECT["name"] for extra in need.extras}
    return [need for need in needs if need.name != PROJECT["name"]] + (of(own) if own else [])


def test_the_lock_file_is_exact_and_within_the_bounds():
    versions = locked()
    assert not {"flora", PROJECT["name"]} & set(versions)
    assert [str(need) for need in [*REQUIRED, *of(EXTRAS.split(","))] if unmet(need, versions)] == []


def test_the_lock_file_names_all_that_its_packages_need():
    versions, missing = locked(), []
    for name in versions:
        try:
            needs = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:
            continue  # of an extra that this environment has not
        missing += [f"{name} needs {need}" for need in needs if wanted(need) and unmet(need, versions)]
    assert missing == []


def test_the_lock_is_what_pip_says_it_would_install():
    where = {"python_version": "3.11", "platform_system": "Linux", "platform_machine": "x86_64"}
    names = {"torch": "2", "flora-peft": "0.2.0", "Absl": "1"}
    install = [{"metadata": {"name": name, "version": version}} for name, version in names.items()]
    lines = rendered({"environment": where, "install": install}).splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["Absl==1", "torch==2"]
    assert "CPython 3.11, Linux x86_64" in lines[0]


@pytest.mark.slow
def test_what_the_lock_names_can_be_installed_and_trains(tmp_path):
    """Once a week: `.ci/locked` runs it alone, with nothing of this environment."""
    python = tmp_path / "venv" / "bin" / "python"
    pip = [python, "-m", "pip"]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "-r", ROOT / "requirements.lock"], check=True)
    checked = subprocess.run([*pip, "check"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    quick = ("task=digits", "trainer.max_steps=2", "trainer.max_eval_examples=16", "logger=none", "trainer.device=cpu")
    command = [python, ROOT / "train.py", *quick, f"paths.output={tmp_path}/o", f"paths.results={tmp_path}/r"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    (path,) = (tmp_path / "r").glob("*.json")
    record, versions = json.loads(path.read_text()), locked()
    used = {name: version.partition("+")[0] for name, version in record["versions"].items() if name in versions}
    assert len(used) > 5
    assert used == {name: versions[name] for name in used}


def test_records_name_the_lock_file():
    assert lock_digest() == hashlib.sha256((ROOT / "requirements.lock").read_bytes()).hexdigest()
