"""Datasets that torchvision downloads: checked whole, unreachable servers named."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from flora.errors import DataError
from flora.tasks import Vtab
from flora.tasks.vtab import download
from tests.tasks.conftest import numbers, png


def load(dataset: str):
    return Vtab(name="vtab", dataset=dataset, epochs=1).load(image_size=8, data_dir=None)


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """An empty cache, and a server that is never there."""

    def refuse(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path))
    return tmp_path / "datasets"


def expect(monkeypatch, dataset: str, images: int) -> None:
    monkeypatch.setitem(download.SOURCES, dataset, replace(download.SOURCES[dataset], images=images))


def write(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(number))


def test_official_splits_are_read_from_what_was_downloaded(cache, monkeypatch):
    root = cache / "dtd" / "dtd"
    lists = {"train": range(0, 94), "val": range(100, 147), "test": range(200, 247)}
    for split, members in lists.items():
        lines = [f"class{i % 47:02d}/{i}.png" for i in members]
        for line, number in zip(lines, members, strict=True):
            write(root / "images" / line, number)
        (root / "labels").mkdir(exist_ok=True)
        (root / "labels" / f"{split}1.txt").write_text("\n".join(lines))
    expect(monkeypatch, "dtd", 94 + 47 + 47)

    splits = load("dtd")

    assert numbers(splits.train.images.numpy()) == list(range(94))
    assert splits.train.labels.tolist() == [i % 47 for i in range(94)]
    assert numbers(splits.validation.images.numpy()) == list(range(100, 147))
    assert numbers(splits.test.images.numpy()) == list(range(200, 247))
    assert splits.class_names[46] == "class46"
    assert splits.facts["source"] == "torchvision, https://www.robots.ox.ac.uk"


@pytest.mark.parametrize(("images", "sizes"), [(2000, [800, 200, 400]), (500, [320, 80, 100])])
def test_where_there_is_no_official_test_set_a_fifth_is_drawn(cache, monkeypatch, images, sizes):
    for number in range(images):
        write(cache / "eurosat" / "2750" / f"class{number % 10}" / f"{number:04d}.png", number)
    expect(monkeypatch, "eurosat", images)
    splits = load("eurosat")
    members = [set(numbers(s.images.numpy())) for s in (splits.train, splits.validation, splits.test)]
    assert [len(m) for m in members] == sizes
    assert len(set.union(*members)) == sum(sizes)
    assert [n % 10 for n in numbers(splits.test.images.numpy())] == splits.test.labels.tolist()
    assert "test a drawn 20% of the images" in splits.facts["split_rule"]


def test_caltech101_trains_on_thirty_images_of_each_of_102_classes(cache, monkeypatch):
    names = ["BACKGROUND_Google", *(f"class{c:03d}" for c in range(101))]
    for c, name in enumerate(names):
        for i in range(32):
            write(cache / "caltech101" / "101_ObjectCategories" / name / f"image_{i:04d}.png", 32 * c + i)
    expect(monkeypatch, "caltech101", 102 * 32)
    splits = load("caltech101")
    assert splits.class_names == names
    # Two images of each class are left to test.
    assert splits.test.labels.tolist() == [c for c in range(102) for _ in range(2)]
    test, train = (set(numbers(s.images.numpy())) for s in (splits.test, splits.train.concat(splits.validation)))
    assert len(train) == 1000
    assert not train & test
    assert "30 of each class" in splits.facts["pool_rule"]


def test_a_half_unpacked_folder_is_not_taken_for_the_dataset(cache):
    write(cache / "eurosat" / "2750" / "Forest" / "1.png", 1)
    with pytest.raises(DataError, match=r"holds 1 of its 27000 images: remove them there and try again"):
        load("eurosat")


def test_no_server_and_an_empty_cache(cache):
    with pytest.raises(DataError, match=r"http://ufldl.stanford.edu cannot be reached to download svhn"):
        load("svhn")


def test_a_download_that_breaks_off(cache, monkeypatch):
    def broken(root, fetch):
        raise RuntimeError("File not found or corrupted.\nmore")

    monkeypatch.setitem(download.SOURCES, "dtd", replace(download.SOURCES["dtd"], load=broken))
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: Image.new("1", (1, 1)))
    with pytest.raises(DataError, match=r"the download of dtd from .* failed \(File not found or corrupted\.\);"):
        load("dtd")
