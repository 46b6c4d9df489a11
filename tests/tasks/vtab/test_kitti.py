"""KITTI: fetched with its listed checksums, and split by video as VTAB splits it."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest

from flora.errors import DataError
from flora.tasks.prepare.items import find
from flora.tasks.vtab import download, kitti
from flora.tasks.vtab.raw import miscounted
from tests.tasks.conftest import numbers, png

FRAMES = 40  # of 20 drives, two each


def drive(number: int) -> str:
    return f"2011_09_26_drive_{number:04d}_sync"


@pytest.fixture
def served(monkeypatch, tmp_path):
    """What the server of KITTI serves, by name, with the checksums that are listed for it."""
    # The kit lists frames in the order of the drives; image i is line rand[i] of that list, counted from 1.
    rand = np.random.RandomState(5).permutation(FRAMES) + 1
    lines = [f"2011_09_26 {drive(line // 2)} {line:010d}" for line in range(FRAMES)]
    files = {
        "data_object_image_2.zip": {f"training/image_2/{i:06d}.png": png(i) for i in range(FRAMES)},
        "data_object_label_2.zip": {
            f"training/label_2/{i:06d}.txt": b"Car 0 0 0 " + b"0 " * 9 + b"%d 0\n" % (5 if i % 2 else 15)
            for i in range(FRAMES)
        },
        "devkit_object.zip": {
            "mapping/train_rand.txt": ",".join(map(str, rand)).encode(),
            "mapping/train_mapping.txt": ("\n".join(lines) + "\n").encode(),
        },
    }
    content = {}
    for name, members in files.items():
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for path, data in members.items():
                archive.writestr(path, data)
        content[name] = (tmp_path / name).read_bytes()
    monkeypatch.setattr(kitti, "SHA256", {name: hashlib.sha256(data).hexdigest() for name, data in content.items()})

    def fetch(url, folder, name):
        assert url == f"https://s3.eu-central-1.amazonaws.com/avg-kitti/{name}"
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / name).write_bytes(content[name])

    monkeypatch.setattr(kitti, "download_url", fetch)
    return content, rand


def test_no_drive_is_in_two_splits_and_the_draw_is_tensorflow_datasets(served, tmp_path):
    _, rand = served
    sets = download._kitti(tmp_path / "root", True)
    # By hand: a tenth of the sorted drives with numpy's global seed 123, then as many of the others.
    np.random.seed(123)
    drives = [drive(i) for i in range(20)]
    test = set(np.random.choice(drives, 2, replace=False))
    validation = set(np.random.choice(sorted(set(drives) - test), 2, replace=False))
    expected: dict[str, set[int]] = {"train": set(), "validation": set(), "test": set()}
    for image, line in enumerate(rand):
        name = drive((line - 1) // 2)
        expected["test" if name in test else "validation" if name in validation else "train"].add(image)
    for split, members in sets.items():
        shown = [members[row][0] for row in range(len(members))]
        found = numbers(np.array([np.asarray(image).transpose(2, 0, 1) for image in shown]))
        assert set(found) == expected[split], split
        assert members.targets == [0 if image % 2 else 1 for image in found]  # a car at 5 m, or at 15 m
    assert [len(sets[split]) for split in ("train", "validation", "test")] == [32, 4, 4]
    assert len(download._kitti(tmp_path / "root", False)["test"]) == 4, "found again without a server"


def test_the_official_numbers_of_frames_are_held_to(served, tmp_path, monkeypatch):
    assert find("kitti").rows == {"train": 800, "validation": 200, "test": 711}
    wrong = "train: 32 images, officially 6347; validation: 4 images, officially 423; test: 4 images, officially 711"
    assert download.SOURCES["kitti"].images == 6347 + 423 + 711
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(download, "_ask", lambda *_: None)
    entry = download.Download(download._kitti, "https://s3.eu-central-1.amazonaws.com", FRAMES)
    monkeypatch.setitem(download.SOURCES, "kitti", entry)
    with pytest.raises(DataError, match=f"kitti has not its official splits \\({wrong}\\)"):
        download.download("kitti", 0)
    assert miscounted("eurosat", {}) == []


@pytest.mark.parametrize("name", kitti.SHA256)
def test_another_file_than_the_listed_one_is_removed(served, tmp_path, name):
    served[0][name] += b"more"
    with pytest.raises(RuntimeError, match=rf"{name} has not the sha256 [0-9a-f]* and was removed: try again"):
        download._kitti(tmp_path / "root", True)
    assert not list((tmp_path / "root").rglob(name))
    with pytest.raises((RuntimeError, OSError)):
        download._kitti(tmp_path / "root", False)
