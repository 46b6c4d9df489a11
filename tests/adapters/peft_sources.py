"""PEFT's own tests, from the source distribution of the installed version: downloaded once, never copied into here."""

import importlib.util
import os
import subprocess
import sys
import tarfile
import types
from pathlib import Path
from unittest import mock

import peft


class Unavailable(Exception):
    """The source distribution cannot be had; the message says why."""


def sources() -> Path:
    """Folder of PEFT's source distribution, matching the installed version, in the cache folder.

    Raises:
        Unavailable: if it is neither cached nor to be downloaded.
    """
    cache = Path(os.environ.get("FLORA_CACHE", Path.home() / ".cache" / "flora")) / "peft-sources"
    folder = cache / f"peft-{peft.__version__}"
    if not (folder / "tests").is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        arguments = ["--no-binary", ":all:", "--no-deps", "--no-build-isolation", "--quiet", "--dest", str(cache)]
        command = [sys.executable, "-m", "pip", "download", *arguments, f"peft=={peft.__version__}"]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=180)
        except (subprocess.SubprocessError, OSError) as error:
            message = f"PEFT {peft.__version__} sources are not cached and pip cannot download them: {error}"
            raise Unavailable(message) from error
        with tarfile.open(cache / f"peft-{peft.__version__}.tar.gz") as archive:
            archive.extractall(cache, filter="data")
    return folder


def load_tests(name: str) -> types.ModuleType:
    """Import one of PEFT's test modules, as a member of a package ``peft_tests``."""
    folder = sources() / "tests"
    if "peft_tests" not in sys.modules:
        package = types.ModuleType("peft_tests")
        package.__path__ = [str(folder)]
        sys.modules["peft_tests"] = package
    # Their helpers import diffusers for tests of image generation, which have no part in this.
    stood_in = "diffusers" not in sys.modules and importlib.util.find_spec("diffusers") is None
    if stood_in:
        sys.modules["diffusers"] = mock.MagicMock()
    try:
        return importlib.import_module(f"peft_tests.{name}")
    finally:
        if stood_in:
            del sys.modules["diffusers"]
