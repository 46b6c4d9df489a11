"""One checksum of many files: what changes it, and what it reads again."""

import os
import shutil

import pytest

from flora import contents as module
from flora.contents import checksum

OLD = 1_600_000_000


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder of three files, last changed long ago."""
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "SETTLED_NS", 0)  # a test changes and reads within one moment
    for name in ("a/1", "a/2", "b/3"):
        write(tmp_path / "data" / name, name)
    return tmp_path / "data"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    os.utime(path, (OLD, OLD))


def of(folder):
    return checksum([path for path in folder.rglob("*") if path.is_file()], folder)


def swap(folder):
    (folder / "a" / "1").write_text("a/2")
    (folder / "a" / "2").write_text("a/1")


CHANGES = {
    "a byte": lambda folder: write(folder / "a" / "1", "a/X"),
    "a name": lambda folder: (folder / "a" / "1").rename(folder / "a" / "0"),
    "a file more": lambda folder: write(folder / "a" / "4", ""),
    "a file less": lambda folder: (folder / "b" / "3").unlink(),
    "two files swapped": swap,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_gives_another_checksum_and_the_same_files_the_same(files, change, tmp_path):
    before = of(files)
    assert len(before) == 64
    assert of(files) == before
    shutil.copytree(files, tmp_path / "elsewhere")
    assert of(tmp_path / "elsewhere") == before
    CHANGES[change](files)
    assert of(files) != before


def test_a_file_is_read_again_only_where_it_has_changed(files, monkeypatch):
    read, content = [], module._content
    monkeypatch.setattr(module, "_content", lambda path: (read.append(path.name), content(path))[1])
    first = of(files)
    assert sorted(read) == ["1", "2", "3"]
    write(files / "a" / "2", "a/Y")  # of the same size and time of change
    second = of(files)
    assert sorted(read) == ["1", "2", "2", "3"]
    assert first != second == of(files)
    assert len(read) == 4


def test_what_changed_a_moment_ago_is_not_trusted(files, monkeypatch):
    monkeypatch.setattr(module, "SETTLED_NS", 10**18)
    of(files)
    read = []
    monkeypatch.setattr(module, "_content", lambda path: read.append(path.name) or "0")
    of(files)
    assert sorted(read) == ["1", "2", "3"]


@pytest.mark.parametrize("damage", [b"", b"[1]", b'{"files": {"a/1": [3, 0, 0, "0"]}, "sha256": "0"}'])
def test_a_damaged_cache_is_not_believed(files, tmp_path, damage):
    before = of(files)
    (kept,) = (tmp_path / "cache" / "contents").iterdir()
    kept.write_bytes(damage)
    assert of(files) == before
    kept.write_text(kept.read_text().replace(module._content(files / "a" / "1"), "0" * 64))
    assert of(files) == before


def test_without_a_cache_it_is_the_same(files, tmp_path, capsys):
    before = of(files)
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("in the way")
    assert of(files) == before
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written" in line


def test_a_file_that_cannot_be_read_counts_as_such(files):
    before = of(files)
    paths = [*(path for path in files.rglob("*") if path.is_file()), files / "gone"]
    assert checksum(paths, files) not in (before, checksum(paths[:-1], files))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert module.digests([tmp_path / "pipe"], tmp_path) == {"pipe": module.UNREADABLE}
