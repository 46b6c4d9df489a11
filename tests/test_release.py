"""The distribution: its metadata, its extras, what is said where one is missing, what wheel and archive hold."""

import contextlib
import gzip
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_string
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import flora
from flora import extras
from flora.files import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = PROJECT["optional-dependencies"]
README = (ROOT / "README.md").read_text()
EXAMPLE = re.search(r"```python\n(import flora  #.*?)```", README, re.S)[1]
PROGRAMS = ["train.py", *(f"scripts/{path.name}" for path in sorted((ROOT / "scripts").glob("[!_]*.py")))]
PROGRAMS.remove("scripts/pretrain.py")  # one file, which runs without flora
CORE = {"torch", "transformers", "accelerate", "peft", "numpy", "safetensors"}


def normal(name):
    """A distribution's name as an index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


HOMES = {module: set(map(normal, names)) for module, names in packages_distributions().items()}  # what brings a module
HOMES |= {"google.protobuf": {"protobuf"}}
HOMES |= {"omegaconf": {"hydra-core"}, "submitit": {"hydra-submitit-launcher"}}  # of which these are dependencies

# What a command of pip installs, or a line of environment.yml.
INSTALLED = re.compile(r"(?:pip install|^ +-)(?: --no-deps)?(?: -e)? \"?([\w.-]+\[[\w,]+\]|\.|flora\S*)", re.M)
# A sitecustomize.py: Python does not find what HIDDEN names, as where it is not installed.
HIDE = """
import importlib.machinery, os
finder = importlib.machinery.PathFinder
find, hidden = finder.find_spec, set(os.environ["HIDDEN"].split())
finder.find_spec = classmethod(lambda cls, name, *a: None if name in hidden else find(name, *a))
"""


def build(command, source, output):
    """What setuptools makes there, by a function of its build backend: a path."""
    code = f"from setuptools import build_meta; print(build_meta.{command}({str(output)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return Path(output) / done.stdout.splitlines()[-1]


def without(hidden, folder, *words, place=ROOT):
    """Run Python in a folder where these modules are not found."""
    (folder / "hide").mkdir(exist_ok=True)
    (folder / "hide" / "sitecustomize.py").write_text(HIDE)
    environment = os.environ | {
        "HIDDEN": " ".join(hidden),
        "PYTHONPATH": os.pathsep.join([f"{folder}/hide", str(place)]),
    }
    return subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """As a wheel bears it, built from the files that decide it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "flora/__init__.py", "flora/models/bundled"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, source / name)
    made = build("prepare_metadata_for_build_wheel", source, tmp_path_factory.mktemp("metadata"))
    return message_from_string((made / "METADATA").read_text())


def test_the_distribution_is_flora_peft_of_the_version_that_the_import_says(metadata):
    assert (metadata["Name"], metadata["Version"]) == (extras.DISTRIBUTION, flora.__version__)
    assert "[suite]" in metadata.get_payload()  # the README
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["Requires-Python"] == "<3.14,>=3.11"
    supported = {c.rpartition(" ")[2] for c in metadata.get_all("Classifier") if ":: 3." in c}
    assert supported == {"3.11", "3.12", "3.13"}


def test_metadata_name_the_terms_of_the_code_and_of_the_shipped_networks(metadata):
    cards = {path.relative_to(ROOT).as_posix() for path in (ROOT / "flora/models/bundled").glob("*.md")}
    assert set(metadata.get_all("License-File")) == {"LICENSE", *cards}
    assert metadata["License-Expression"] == "Apache-2.0 AND LicenseRef-ImageNet-terms"


def test_an_install_without_extras_brings_what_peft_needs_and_no_suite(metadata):
    needed = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    assert {need.name for need in needed if need.marker is None} == CORE
    (torch,) = (need for need in needed if need.name == "torch")
    assert not torch.specifier.contains("2.8.0")
    assert torch.specifier.contains("2.9.0")
    assert set(metadata.get_all("Provides-Extra")) == set(DECLARED)


def test_each_module_stands_under_the_extra_that_brings_it():
    declared = {extra: {normal(Requirement(text).name) for text in texts} for extra, texts in DECLARED.items()}
    for extra, modules in extras.MODULES.items():
        assert [m for m in modules if m in HOMES and not HOMES[m] & declared[extra]] == [], extra
    named = {name for m in extras.MODULES["suite"] for name in HOMES[m]}
    assert declared["suite"] - named == {"hydra-joblib-launcher"}  # a plugin that Hydra finds


def test_what_is_said_of_installing_names_this_distribution_and_its_extras():
    files = [*(ROOT / "flora").rglob("*.py"), *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.yaml")]
    said = {}
    for path in (*files, ROOT / "README.md", ROOT / "Makefile", ROOT / "environment.yml", ROOT / "requirements.lock"):
        for target in INSTALLED.findall(path.read_text()):
            said.setdefault(target, path.name)
    assert {".", ".[suite]", ".[dev]", ".[search]"} <= set(said)
    for target, page in said.items():
        name, _, names = target.rstrip("]").partition("[")
        assert name in (".", extras.DISTRIBUTION), (target, page)
        assert set(filter(None, names.split(","))) <= set(DECLARED), (target, page)


def test_the_version_is_said_alike_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    archived = set(re.findall(r"flora-(\d[\d.]*\d)", (ROOT / "docs/release.md").read_text()))
    assert {citation["version"], newest, *archived} == {flora.__version__}
    assert citation["preferred-citation"]["url"].endswith("2405.14739")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_without_the_suite_ends_in_one_line(program, tmp_path):
    ended = without(extras.MODULES["suite"], tmp_path, str(ROOT / program))
    said = 'error: this program needs hydra, which is not installed: pip install -e ".[suite]"\n'
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", said)


def test_a_module_that_is_missed_later_is_one_line_too(tmp_path):
    ended = without(["matplotlib"], tmp_path, str(ROOT / "train.py"), "--cfg", "job")
    assert ended.returncode == 0, ended.stderr  # which draws nothing
    words = ("-c", "from flora.launch.entry import main; main(lambda: __import__('hotcoco'), trace=lambda: False)")
    ended = without(["hotcoco"], tmp_path, *words)
    said = 'error: this needs hotcoco, which is not installed: pip install -e ".[suite]"\n'
    assert (ended.returncode, ended.stderr) == (2, said)


def brought(names):
    """Distributions that come with some: their dependencies, and those of these."""
    met = set()
    while names - met:
        name = min(names - met)
        met.add(name)
        with contextlib.suppress(PackageNotFoundError):  # of another platform
            needs = map(Requirement, requires(name) or [])
            names = names | {normal(n.name) for n in needs if n.marker is None or n.marker.evaluate({"extra": ""})}
    return met


def of_extras():
    """Modules that only extras bring."""
    core = brought(CORE)
    modules = (module for modules in extras.MODULES.values() for module in modules)
    return [module for module in modules if not HOMES.get(module, set()) & core]


def test_without_extras_peft_has_every_method_and_flora_load_says_which_it_needs(tmp_path):
    asked = "from flora.methods import *; import peft, flora; print(peft.get_peft_config({'peft_type': 'FLORA'}).r); "
    ended = without(of_extras(), tmp_path, "-c", f"{asked}flora.load('outputs/RUN_ID')")
    assert int(ended.stdout) > 0
    said = 'flora.load needs omegaconf, which is not installed: pip install -e ".[suite]"'
    assert ended.stderr.splitlines()[-1] == f"ModuleNotFoundError: {said}"


def test_an_installed_package_is_told_its_distribution(monkeypatch, tmp_path):
    monkeypatch.setattr(extras, "ROOT", tmp_path)  # where no clone is
    assert extras.needs("a.gguf", "gguf") == (
        'a.gguf needs gguf, which is not installed: pip install "flora-peft[embedded]"'
    )
    error = ModuleNotFoundError("No module named 'lycoris'", name="lycoris.functional")
    assert "flora-peft[lycoris]" in (extras.explained("locon_tucker", error) or "")
    assert extras.explained("it", ModuleNotFoundError("No module named 'mine'", name="mine")) is None


def archive(folder):
    """The archive that docs/release.md makes, of the newest commit."""
    (line,) = re.findall(r"^ +(git archive .*)$", (ROOT / "docs/release.md").read_text(), re.M)
    words = [word.replace("--output=", f"--output={folder}/") for word in line.split()]
    words[-1] = "HEAD"
    try:
        subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git repository")
    (path,) = folder.glob("*.tar.gz")
    return path


def test_the_archive_holds_records_and_names_its_commit(tmp_path):
    path = archive(tmp_path)
    with tarfile.open(path) as held:
        names = {name.partition("/")[2] for name in held.getnames()}
    records = {f"results/measured/{file.name}" for file in (ROOT / "results/measured").glob("*.json")}
    assert len(records & names) > 100
    assert {"CITATION.cff", "LICENSE", "train.py", "results/rendered.json", "requirements.lock"} <= names
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert gzip.decompress(path.read_bytes())[:4096].find(commit.encode()) > 0


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel, made from a source distribution, made from a copy of the tracked files: (wheel, unpacked source)."""
    folder = tmp_path_factory.mktemp("built")
    with tarfile.open(archive(folder)) as held:
        held.extractall(folder, filter="data")
    (copy,) = folder.glob("flora-*/")
    with tarfile.open(build("build_sdist", copy, folder)) as held:
        held.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return build("build_wheel", source, folder), source


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_the_source_all_but_results(built):
    wheel, source = built
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"flora", f"flora_peft-{flora.__version__}.dist-info"}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert set(names) >= {name for name in tracked if name.startswith("flora/")}
    kept = {name for name in tracked if not name.startswith(("results/", ".")) or name.startswith("results/reported/")}
    assert kept - {path.relative_to(source).as_posix() for path in source.rglob("*")} == set()
    assert not (source / "results/measured").exists()
    ended = subprocess.run([sys.executable, "train.py", "--cfg", "job"], cwd=source, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
def test_the_wheel_alone_runs_the_peft_example_and_loads_a_saved_run(built, tmp_path):
    wheel, _ = built
    quick = ("task=digits", "trainer.max_steps=2", "trainer.max_eval_examples=16", "logger=none", "trainer.device=cpu")
    subprocess.run([sys.executable, ROOT / "train.py", *quick], cwd=tmp_path, check=True, capture_output=True)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (run,) = (path for path in (tmp_path / "outputs").iterdir() if (path / "adapter").is_dir())
    program = f"""
import flora
from PIL import Image
predictor = flora.load({str(run)!r})
print(predictor.predict(Image.new("RGB", (8, 8))).label in predictor.class_names, flora.__file__)
"""
    site = tmp_path / "site"
    ended = without(of_extras(), tmp_path, "-c", EXAMPLE, place=site)
    assert ended.returncode == 0, ended.stderr
    ended = without([], tmp_path, "-c", program, place=site)
    assert ended.returncode == 0, ended.stderr
    known, place = ended.stdout.splitlines()[-1].split()
    assert known == "True"
    assert Path(place).is_relative_to(tmp_path / "site")
