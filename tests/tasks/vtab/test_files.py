"""VTAB beyond parquet: official lists, the hub, label rules, stand-ins by another column, preprocessing switches."""

import numpy as np
import pytest

from flora.errors import DataError
from flora.results import cells
from flora.tasks import Vtab
from flora.tasks.prepare.folder import prepare
from flora.tasks.prepare.items import find
from flora.tasks.vtab import rules
from flora.tasks.vtab.datasets import DATASETS
from tests.tasks.conftest import numbers, png
from tests.tasks.texts import write_rows


def load(folder, dataset="eurosat", **options):
    task = Vtab(**{"name": "vtab", "dataset": dataset, "epochs": 1} | options)
    return task.load(image_size=8, data_dir=folder)


def write_lists(folder, sizes=(30, 10, 20), classes=10):
    """Images numbered through the three official lists, in the folder layout that they are published in."""
    number = 0
    for name, size in zip(("train800", "val200", "test"), sizes, strict=True):
        lines = []
        for _ in range(size):
            file = f"images/{name}/an image {number}.png"
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(png(number))
            lines.append(f"{file} {number % classes}")
            number += 1
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(("dataset", "folder"), [("eurosat", "eurosat"), ("clevr_distance", "clevr_dist")])
def test_official_lists_are_taken_as_they_are(tmp_path, dataset, folder):
    classes = DATASETS[dataset].classes
    write_lists(tmp_path / folder, classes=classes)
    splits = load(tmp_path, dataset)
    parts = [numbers(s.images.numpy()) for s in (splits.train, splits.validation, splits.test)]
    assert parts == [list(range(30)), list(range(30, 40)), list(range(40, 60))]
    assert splits.test.labels.tolist() == [n % classes for n in range(40, 60)]
    assert splits.facts["source"] == "paths.data, official lists"
    assert splits.facts["split_rule"] == "as in the files"
    assert splits.facts["files"]["val200.txt"]["rows"] == 10


def test_lists_that_do_not_fit_name_the_line(tmp_path):
    write_lists(tmp_path / "eurosat")
    (tmp_path / "eurosat" / "val200.txt").write_text("a.png 1\nb.png 10\n")
    with pytest.raises(DataError, match=r"val200\.txt, line 2: 'b\.png 10' is not PATH LABEL .* 0\.\.9"):
        load(tmp_path)
    (tmp_path / "eurosat" / "val200.txt").write_bytes(png(1))
    with pytest.raises(DataError, match=r"val200\.txt cannot be read"):
        load(tmp_path)
    (tmp_path / "eurosat" / "val200.txt").unlink()
    with pytest.raises(DataError, match=r"no val200\.txt"):
        load(tmp_path)


def test_a_list_that_changed_since_it_was_prepared_is_refused(tmp_path):
    write_lists(tmp_path / "eurosat")
    prepare(find("eurosat"), tmp_path)
    load(tmp_path)
    path = tmp_path / "eurosat" / "val200.txt"
    path.write_text(path.read_text().replace(" 0\n", " 1\n"))
    with pytest.raises(DataError, match=r"val200\.txt has changed since it was prepared"):
        load(tmp_path)


def test_the_facts_hold_a_checksum_of_the_images_of_each_list(tmp_path):
    write_lists(tmp_path / "eurosat")
    before = {name: fact["images_sha256"] for name, fact in load(tmp_path).facts["files"].items()}
    (tmp_path / "eurosat" / "images" / "test" / "an image 45.png").write_bytes(png(46))
    after = {name: fact["images_sha256"] for name, fact in load(tmp_path).facts["files"].items()}
    assert {name for name in before if before[name] != after[name]} == {"test.txt"}


def test_a_missing_image_of_a_list_is_skipped_and_counted_or_an_error(tmp_path):
    write_lists(tmp_path / "eurosat")
    (tmp_path / "eurosat" / "images" / "train800" / "an image 3.png").unlink()
    with pytest.raises(DataError, match=r"train800\.txt, line 4"):
        load(tmp_path)
    splits = load(tmp_path, unreadable="skip")
    assert len(splits.train) == 29
    assert splits.facts["unreadable"]["skipped"] == 1


def test_a_copy_on_the_hub_can_be_named(write_split, tmp_path, monkeypatch):
    for split, rows, start in [("train", 30, 0), ("test", 20, 200)]:
        write_split(split, rows, start, folder="repository", classes=45)
    asked = []

    def snapshot(repository, **options):
        asked.append((repository, options["repo_type"]))
        return str(tmp_path / "repository")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    splits = load(tmp_path / "none", "resisc45", hub="somebody/resisc45")
    assert asked == [("somebody/resisc45", "dataset")]
    assert splits.facts["source"] == "hub somebody/resisc45"
    assert len(splits.test) == 20


def test_without_any_source_the_message_says_what_would_help(tmp_path):
    with pytest.raises(DataError, match=r"has no folder dmlab .* task\.hub=OWNER/NAME"):
        load(tmp_path, "dmlab")


def test_nlvrs_object_counts_stand_in_for_clevrs(tmp_path):
    for split, counts in {"train": [3, 20, 7] * 4, "test": [4, 19, 12]}.items():
        start = 10 if split == "test" else 0  # two of the test's images are in train as well
        images = [{"bytes": png(start + i, (40, 10)), "path": None} for i in range(len(counts))][::-1]
        columns = {"image": images, "label": [0] * len(counts), "num_objects": counts}
        write_rows(tmp_path / "nlvr" / f"{split}.parquet", columns)
    splits = load(tmp_path, "nlvr_count")
    assert splits.test.labels.tolist() == [1]
    assert splits.facts["left_out"]["test"] == 2
    assert splits.facts["counts"]["test"] == 1
    assert splits.num_classes == 18
    assert (splits.class_names[0], splits.class_names[-1]) == ("3", "20")
    assert splits.facts["stands_for"] == "clevr_count"
    write_rows(tmp_path / "nlvr" / "test.parquet", {"image": images[-2:], "num_objects": [4, 5]})
    with pytest.raises(DataError, match="every image of test is in train or validation as well"):
        load(tmp_path, "nlvr_count")
    columns = {"image": [{"bytes": png(0), "path": None}] * 2, "num_objects": [4, 21]}
    write_rows(tmp_path / "nlvr" / "test.parquet", columns)
    with pytest.raises(DataError, match=r"row 1: num_objects 21, outside 3\.\.20"):
        load(tmp_path, "nlvr_count")


def test_label_rules_are_those_of_vtab():
    assert [rules.clevr_count(n) for n in (3, 10)] == [0, 7]
    depths = {7.9: 0, 8.2: 1, 8.7: 2, 9.1: 3, 9.6: 4, 10.5: 5}
    assert {depth: rules.clevr_distance([depth, 11.0]) for depth in depths} == depths
    assert rules.kitti([("Car", 5.0), ("Truck", 2.0)]) == 0
    assert rules.kitti([("Van", 15.0), ("Pedestrian", 2.0)]) == 1
    assert rules.kitti([("Car", 60.0)]) == 2
    assert rules.kitti([("Cyclist", 3.0), ("DontCare", -1000.0)]) == 3


def test_the_groups_of_the_table_are_those_of_the_datasets():
    groups = cells.load("vtab", "paper").definition["groups"]["paper"]
    nineteen = {name: info.group for name, info in DATASETS.items() if info.stands_for is None}
    assert {name: group for group, names in groups.items() for name in names} == nineteen


@pytest.mark.data
def test_nlvr_has_eighteen_counts(data_folder):
    splits = Vtab(name="vtab", dataset="nlvr_count", epochs=1).load(image_size=16, data_dir=data_folder)
    assert len(np.unique(splits.train.labels)) > 12
    assert len(splits.test) == 981 - 27  # whose images are in train or validation
