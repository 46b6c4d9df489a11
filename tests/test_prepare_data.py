"""Filling the data folder: copied and downloaded, checked, described, once, and by two at the same time."""

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flora.errors import DataError
from flora.launch.entry import main
from flora.tasks import Vtab, manifest
from flora.tasks.images.decode import Pool
from flora.tasks.prepare.folder import prepare, state
from flora.tasks.prepare.items import catalogue, find
from flora.tasks.vtab import download
from scripts.prepare_data import prepare_data
from tests.tasks.conftest import numbers
from tests.tasks.texts import write_rows


@pytest.fixture
def call(tmp_path, script):
    """Run prepare_data.py in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        entry = partial(main, prepare_data, trace=lambda: False)
        return script(entry, "prepare_data.py", *arguments, "--data", tmp_path / "data")

    return run


@pytest.fixture
def source(tmp_path):
    """A folder with RTE, its dev set of the official size."""
    for split, rows in {"train": 20, "validation": 277}.items():
        columns = {"sentence1": ["a"] * rows, "sentence2": ["b"] * rows, "label": [i % 2 for i in range(rows)]}
        write_rows(tmp_path / "source" / "glue" / "rte" / f"{split}.parquet", columns)
    return tmp_path / "source"


def test_texts_that_stand_in_train_and_in_dev_are_counted(call, tmp_path):
    rows = {
        "train": ([("the cat", "a"), ("the cat", "a"), ("a dog", "b"), ("b", "a dog")], [0, 1, 0, 0]),
        # twice a pair of train, once with a label that it has not there, once in the other order, once in capitals
        "validation": ([("the cat", "a"), ("a dog", "b"), ("a", "the cat"), ("A dog", "b")], [0, 1, 0, 0]),
    }
    for split, (pairs, labels) in rows.items():
        columns = {"sentence1": [one for one, _ in pairs], "sentence2": [two for _, two in pairs], "label": labels}
        write_rows(tmp_path / "source" / "glue" / "rte" / f"{split}.parquet", columns)
    code, out, err = call("glue/rte", "--from", str(tmp_path / "source"))
    assert code == 0, err
    described = manifest.read(tmp_path / "data" / "glue" / "rte")
    assert described["shared_texts"] == {"train, validation": {"exact": 2, "other_label": 1}}
    assert "glue/rte: 2 rows stand in both of train, validation; they stay, and are counted" in out


@pytest.mark.data
@pytest.mark.parametrize(
    ("dataset", "exact", "other"), [("cola", 16, 2), ("stsb", 6, 1), ("rte", 0, 0), ("mrpc", 0, 0)]
)
def test_the_real_glue_shares_few_texts(dataset, exact, other):
    item = find(f"glue/{dataset}")
    assert item.shared_texts(Path(os.environ["FLORA_DATA"]) / "glue" / dataset) == {
        "train, validation": {"exact": exact, "other_label": other}
    }


def test_a_copied_dataset_is_checked_described_and_then_left_alone(call, source, tmp_path):
    code, out, err = call("glue/rte", "--from", str(source))
    assert code == 0, err
    assert "glue/rte: train 20, validation 277 (copied)" in out
    assert "warning: train: 20 rows, officially 2490" in err
    folder = tmp_path / "data" / "glue" / "rte"
    described = manifest.read(folder)
    expected = hashlib.sha256((source / "glue" / "rte" / "train.parquet").read_bytes()).hexdigest()
    assert described["files"]["train.parquet"]["sha256"] == expected
    assert (described["classes"], described["official_classes"]) == (2, 2)
    assert described["warnings"] == ["train: 20 rows, officially 2490"]
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert call("glue/rte", "--from", "/nowhere")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_what_changed_or_vanished_since_is_refused(call, source, tmp_path):
    call("glue/rte", "--from", str(source))
    path = tmp_path / "data" / "glue" / "rte" / "validation.parquet"
    path.write_bytes(path.read_bytes() + b" ")
    code, _, err = call("glue/rte")
    assert code == 2
    assert "has changed since it was prepared" in err
    path.unlink()
    assert "validation.parquet is gone" in call("glue/rte")[2]


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": ["train.parquet"]}', '{"files": {"train.parquet": 1}}'])
def test_a_manifest_of_something_else_is_refused(source, content):
    (source / "glue" / "rte" / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json is no manifest \(it lists no files\): delete it"):
        prepare(find("glue/rte"), source)


def test_bad_files_leave_nothing_behind_and_say_where_they_lie(call, source, tmp_path):
    write_rows(source / "glue" / "rte" / "train.parquet", {"sentence1": ["a"], "sentence2": ["b"], "label": [2]})
    code, _, err = call("glue/rte", "--from", str(source))
    assert code == 2
    assert f"{source}: glue/rte/train.parquet, row 0: label 2, outside 0..1" in err
    assert err.strip().splitlines()[-1] == "error: 1 of 1 datasets could not be prepared: glue/rte"
    assert list((tmp_path / "data" / "glue").iterdir()) == []


def test_a_folder_of_the_users_gets_a_manifest_where_it_lies(source):
    item = find("glue/rte")
    assert state(item, source) == "without manifest"
    assert prepare(item, source)["source"] == "found there"
    assert state(item, source) == "ready"


def test_what_an_interrupted_call_left_is_swept_away(call, source, tmp_path):
    left = tmp_path / "data" / "glue" / ".rte.fresh"
    left.mkdir(parents=True)
    (left / "train.parquet").write_bytes(b"half")
    assert call("glue/rte", "--from", str(source))[0] == 0
    assert sorted(p.name for p in (tmp_path / "data" / "glue").iterdir()) == ["rte"]


@pytest.fixture
def server(monkeypatch):
    """EuroSAT's server, slow; the calls it got."""
    calls = []

    def open_image(number):
        return Image.new("RGB", (8, 8), (number // 100, number % 100, 7))

    def fetch(dataset, split_seed):
        calls.append(dataset)
        time.sleep(0.2)
        labels = np.arange(1500) % 10
        pool = Pool(labels, lambda rows: (partial(open_image, int(row)) for row in rows), str)
        return {"train": pool}, [f"class {c}" for c in range(10)], {"source": "torchvision, a server"}

    monkeypatch.setattr(download, "download", fetch)
    return calls


def test_a_download_becomes_vtabs_splits_with_their_images(tmp_path, server):
    described = prepare(find("eurosat"), tmp_path)
    assert described["rows"] == {"train": 800, "validation": 200, "test": 300}
    assert described["warnings"] == ["test: 300 rows, officially 5400"]
    splits = Vtab(name="vtab", dataset="eurosat", epochs=1).load(image_size=8, data_dir=tmp_path)
    assert splits.facts["split_rule"] == "as in the files"
    parts = [numbers(part.images.numpy()) for part in (splits.train, splits.validation, splits.test)]
    assert len(set().union(*parts)) == 1300
    for part, split in zip(parts, (splits.train, splits.validation, splits.test), strict=True):
        assert [n % 10 for n in part] == split.labels.tolist()
    assert splits.class_names[3] == "class 3"


def test_of_two_at_once_one_waits_and_finds_it_ready(tmp_path, server):
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: prepare(find("eurosat"), tmp_path), range(2))
    assert server == ["eurosat"]
    assert first == second


def test_what_no_server_offers_says_so(tmp_path):
    with pytest.raises(DataError, match=r"dmlab: no server is asked for it; give a folder .* --from"):
        prepare(find("dmlab"), tmp_path)
    with pytest.raises(DataError, match=r"glue/qqp: HF_HUB_OFFLINE is set; give a folder"):
        prepare(find("glue/qqp"), tmp_path)


def test_every_dataset_is_listed_with_its_official_rows(call):
    code, out, _ = call("--list")
    assert code == 0
    lines = {line[18:].split()[0]: line for line in out.splitlines()}
    assert len(lines) == len(catalogue()) == 9 + 8 + 17 + 4 + 2
    assert "officially train 392702, validation_matched 9815, validation_mismatched 9832" in lines["glue/mnli"]
    assert lines["eurosat"].startswith("absent")


def test_an_unknown_name_is_answered_with_near_ones(call):
    code, _, err = call("glue/rt")
    assert code == 2
    assert "did you mean glue/rte" in err


OFFICIAL = ("glue/cola", "glue/sst2", "glue/mrpc", "glue/stsb", "glue/rte", "glue/wnli", "boolq")


@pytest.mark.data
@pytest.mark.parametrize("name", OFFICIAL)
def test_the_real_files_have_the_official_numbers_of_rows_and_classes(tmp_path, name):
    described = prepare(find(name), tmp_path, Path(os.environ["FLORA_DATA"]))
    assert described["warnings"] == []
    assert described["rows"] == described["official_rows"]
    json.dumps(described)
