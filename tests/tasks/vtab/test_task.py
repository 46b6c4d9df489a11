"""VTAB-1K: the table of datasets, splits drawn from files, bad and missing files, settings."""

import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from pyarrow import parquet as pq

from flora.config import instantiate
from flora.errors import ConfigError, DataError
from flora.tasks import Vtab
from flora.tasks.vtab.datasets import ALIASES, DATASETS
from tests.tasks.conftest import numbers, png

CONFIGS = Path(__file__).parents[3] / "configs"


def vtab(dataset: str = "eurosat", **settings) -> Vtab:
    return Vtab(**{"name": "vtab", "dataset": dataset, "epochs": 1} | settings)


def load(folder: Path, **settings):
    return vtab(**settings).load(image_size=8, data_dir=folder)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))


class TestTable:
    def test_has_vtabs_19_datasets_with_their_classes_in_three_groups(self):
        # Table 1 and appendix of the VTAB paper.
        published = {
            "natural": {
                "caltech101": 102,
                "cifar100": 100,
                "dtd": 47,
                "flowers102": 102,
                "pets": 37,
                "sun397": 397,
                "svhn": 10,
            },
            "specialized": {"patch_camelyon": 2, "eurosat": 10, "resisc45": 45, "diabetic_retinopathy": 5},
            "structured": {
                "clevr_count": 8,
                "clevr_distance": 6,
                "dmlab": 6,
                "kitti": 4,
                "dsprites_location": 16,
                "dsprites_orientation": 16,
                "smallnorb_azimuth": 18,
                "smallnorb_elevation": 9,
            },
        }
        real = {name: info for name, info in DATASETS.items() if info.stands_for is None}
        groups = {g: {n: e.classes for n, e in real.items() if e.group == g} for g in published}
        assert groups == published
        assert len(real) == 19

    def test_stand_ins_belong_to_the_group_of_what_they_stand_for(self):
        stand_ins = {name: info for name, info in DATASETS.items() if info.stands_for}
        assert {name: info.stands_for for name, info in stand_ins.items()} == {
            "cifar10": "cifar100",
            "dtd10": "dtd",
            "rsscn7": "resisc45",
            "nlvr_count": "clevr_count",
        }
        assert all(info.group == DATASETS[info.stands_for].group for info in stand_ins.values())

    def test_short_names_lead_to_vtabs_names(self):
        assert {alias: vtab(alias).dataset for alias in ALIASES} == ALIASES
        assert vtab("smallnorb_azi").dataset == "smallnorb_azimuth"

    def test_images_are_only_resized_unless_asked(self):
        assert all(vtab(name).augment() is None for name in DATASETS)

    def test_augmentation_keeps_labels_true(self):
        assert vtab("dsprites_orientation", augment="auto").augment() is None
        flips = {name: bool(a and a.flip) for name in DATASETS for a in [vtab(name, augment="auto").augment()]}
        assert not flips["svhn"]
        assert not flips["smallnorb_azimuth"]
        assert flips["eurosat"]
        assert vtab("eurosat", augment="none").augment() is None
        assert vtab("svhn", augment="crop_flip").augment().flip

    def test_unknown_names_are_answered_with_near_ones(self):
        with pytest.raises(ConfigError, match=r"eurostat is unknown; did you mean eurosat\? .*smallnorb_elevation"):
            vtab("eurostat")


class TestFiles:
    def test_three_small_files_are_taken_as_they_are(self, write_split, tmp_path):
        for split, rows, start in [("train", 30, 0), ("validation", 10, 100), ("test", 20, 200)]:
            write_split(split, rows, start)
        splits = load(tmp_path)
        assert numbers(splits.train.images.numpy()) == list(range(30))
        assert numbers(splits.validation.images.numpy()) == list(range(100, 110))
        assert numbers(splits.test.images.numpy()) == list(range(200, 220))
        assert splits.test.labels.tolist() == [n % 10 for n in range(200, 220)]
        assert splits.class_names[3] == "class 3"
        assert splits.facts["source"] == "paths.data"
        assert splits.facts["split_rule"] == "as in the files"
        assert splits.facts["warnings"] == [
            "train has 30 images, VTAB-1K has 800",
            "validation has 10 images, VTAB-1K has 200",
        ]

    def test_a_larger_train_file_is_drawn_from_with_the_split_seed(self, write_split, tmp_path):
        write_split("train-00000-of-00002", 700)
        write_split("train-00001-of-00002", 600, start=700)
        write_split("test", 5, start=5000)
        splits, again, other = load(tmp_path), load(tmp_path), load(tmp_path, split_seed=1)
        train, validation = (numbers(s.images.numpy()) for s in (splits.train, splits.validation))
        assert (len(train), len(validation)) == (800, 200)
        assert len({*train, *validation}) == 1000
        assert max(train) > 1200
        assert [n % 10 for n in train] == splits.train.labels.tolist()
        assert train == numbers(again.train.images.numpy()) != numbers(other.train.images.numpy())
        assert splits.facts["split_rule"] == "seeded draw, seed 0: train and validation drawn from 1300"
        assert splits.facts["files"]["train-00001-of-00002.parquet"]["rows"] == 600
        assert splits.facts["warnings"] == []

    def test_validation_has_a_file_of_its_own_where_there_is_one(self, write_split, tmp_path):
        for split, rows, start in [("train", 900, 0), ("validation", 250, 1000), ("test", 5, 2000)]:
            write_split(split, rows, start)
        splits = load(tmp_path)
        assert splits.facts["counts"] == {"train": 800, "validation": 200, "test": 5}
        assert max(numbers(splits.train.images.numpy())) < 1000 <= min(numbers(splits.validation.images.numpy()))
        assert splits.facts["split_rule"] == "seeded draw, seed 0: train drawn from 900, validation drawn from 250"

    def test_the_test_set_can_be_cut_short_by_a_draw(self, small_set, tmp_path):
        splits = load(tmp_path, test_size=4)
        chosen = numbers(splits.test.images.numpy())
        assert len(set(chosen)) == 4
        assert chosen != list(range(200, 204))
        assert "test drawn from 20" in splits.facts["split_rule"]
        assert len(load(tmp_path, test_size="full").test) == 20
        with pytest.raises(ConfigError, match="has 20 test images"):
            load(tmp_path, test_size=21)

    def test_a_changed_file_changes_the_record(self, small_set, write_split, tmp_path):
        before = load(tmp_path).facts["files"]
        write_split("test", 20, start=201)
        after = load(tmp_path).facts["files"]
        assert before["train.parquet"] == after["train.parquet"]
        assert before["test.parquet"]["sha256"] != after["test.parquet"]["sha256"]

    def test_images_of_any_mode_and_shape_become_square_rgb(self, small_set, write_split, tmp_path):
        grey = Image.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30))
        buffer = io.BytesIO()
        grey.save(buffer, "PNG")
        write_split("train", 1, replace={0: buffer.getvalue()})
        image = vtab().load(image_size=16, data_dir=tmp_path, interpolation="bilinear").train.images[0]
        expected = np.asarray(grey.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR))
        assert np.array_equal(image.permute(1, 2, 0), expected)

    def test_a_file_may_hold_paths_instead_of_bytes(self, small_set, tmp_path):
        (tmp_path / "eurosat" / "a.png").write_bytes(png(42))
        rewrite(small_set["train"], "image", pa.array([{"bytes": None, "path": "a.png"}] * 30))
        assert numbers(load(tmp_path).train.images.numpy()) == [42] * 30

    def test_without_names_in_the_file_classes_are_called_by_number(self, small_set, tmp_path):
        for path in small_set.values():
            pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
        assert load(tmp_path).class_names == [str(c) for c in range(10)]


class TestBadFiles:
    def test_an_unreadable_image_is_an_error_that_names_its_row(self, small_set, write_split, tmp_path):
        path = write_split("train", 30, replace={17: png(17)[:40]})
        with pytest.raises(DataError, match=rf"{path}, row 17: .*task.unreadable=skip"):
            load(tmp_path)

    def test_or_is_left_out_and_counted(self, small_set, write_split, tmp_path):
        path = write_split("train", 30, replace={17: png(17)[:40], 20: b"", 21: b"no image"})
        splits = load(tmp_path, unreadable="skip")
        kept = [n for n in range(30) if n not in (17, 20, 21)]
        assert numbers(splits.train.images.numpy()) == kept
        assert splits.train.labels.tolist() == [n % 10 for n in kept]
        assert splits.facts["counts"]["train"] == 27
        assert splits.facts["unreadable"] == {
            "policy": "skip",
            "skipped": 3,
            "first": [f"{path}, row {row}" for row in (17, 20, 21)],
        }

    def test_nothing_readable_is_an_error_even_then(self, small_set, write_split, tmp_path):
        write_split("train", 2, replace={0: b"", 1: b""})
        with pytest.raises(DataError, match="no image can be decoded"):
            load(tmp_path, unreadable="skip")

    def test_a_file_that_is_no_parquet(self, small_set, tmp_path):
        small_set["validation"].write_bytes(b"garbage")
        with pytest.raises(DataError, match=r"validation.parquet: not a readable parquet file .*fetch it again"):
            load(tmp_path)

    def test_a_file_cut_short(self, small_set, tmp_path):
        whole = small_set["train"].read_bytes()
        small_set["train"].write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=r"train.parquet: not a readable parquet file"):
            load(tmp_path)

    def test_damage_inside_a_file_does_not_pass(self, small_set, tmp_path):
        whole = bytearray(small_set["train"].read_bytes())
        whole[100 : len(whole) - 2000] = bytes(len(whole) - 2100)
        small_set["train"].write_bytes(bytes(whole))
        with pytest.raises(DataError, match=r"train.parquet"):
            load(tmp_path)

    def test_a_missing_column_or_two_of_one_name(self, small_set, tmp_path):
        path = small_set["test"]
        rows = pq.read_table(path)
        pq.write_table(rows.append_column("label", rows["label"]), path)
        with pytest.raises(DataError, match=r"test.parquet: no single column label \(it has image, label, label\)"):
            load(tmp_path)
        pq.write_table(rows.rename_columns(["image", "target"]).replace_schema_metadata(None), path)
        with pytest.raises(DataError, match=r"test.parquet: no single column label \(it has image, target\)"):
            load(tmp_path)

    def test_columns_of_the_wrong_type(self, small_set, tmp_path):
        rewrite(small_set["test"], "label", pa.array(["a"] * 20))
        with pytest.raises(DataError, match=r"test.parquet: column label is string; it must hold integers"):
            load(tmp_path)
        rewrite(small_set["train"], "image", pa.array(["a.png"] * 30))
        with pytest.raises(DataError, match=r"train.parquet: column image is string; it must be a struct"):
            load(tmp_path)

    @pytest.mark.parametrize(("label", "says"), [(10, "label 10"), (-1, "label -1"), (None, "label is missing")])
    def test_a_label_out_of_range(self, small_set, write_split, tmp_path, label, says):
        write_split("train", 30, labels=[0] * 12 + [label] + [0] * 17)
        with pytest.raises(DataError, match=rf"train.parquet, row 12: {says}, outside 0..9 \(1 such rows\)"):
            load(tmp_path)

    def test_no_rows(self, small_set, write_split, tmp_path):
        write_split("validation", 0)
        with pytest.raises(DataError, match=r"validation.parquet: no rows"):
            load(tmp_path)

    def test_the_classes_of_another_dataset(self, small_set, write_split, tmp_path):
        write_split("train", 30, classes=7)
        with pytest.raises(DataError, match="7 class names, but this dataset has 10 classes"):
            load(tmp_path)

    def test_class_names_in_another_order(self, small_set, tmp_path):
        table = pq.read_table(small_set["test"])
        text = table.schema.metadata[b"huggingface"].replace(b"class 1", b"class x")
        pq.write_table(table.replace_schema_metadata({b"huggingface": text}), small_set["test"])
        with pytest.raises(DataError, match=r"test.parquet: class names or their order differ"):
            load(tmp_path)

    def test_a_split_that_is_not_there(self, small_set, tmp_path):
        small_set["test"].unlink()
        with pytest.raises(DataError, match=r"eurosat: no test\*.parquet"):
            load(tmp_path)


class TestNotThere:
    def test_the_error_names_what_is_available_offline(self, small_set, tmp_path, offline):
        shutil.copytree(tmp_path / "eurosat", tmp_path / "caltech101")
        with pytest.raises(DataError) as error:
            load(tmp_path, dataset="cifar100")
        text = str(error.value)
        assert "no folder cifar100" in text
        assert "https://www.cs.toronto.edu cannot be reached" in text
        assert text.endswith(f"dsprites_location, dsprites_orientation; in {tmp_path}: caltech101, eurosat")
        assert "\n" not in text

    def test_no_server_is_asked_for_what_cannot_be_downloaded(self, tmp_path, offline):
        with pytest.raises(DataError, match=r"kitti needs files: set paths.data"):
            vtab("kitti").load(image_size=8, data_dir=None)
        with pytest.raises(DataError, match=r"data folder .*nowhere does not exist: set paths.data"):
            vtab("kitti").load(image_size=8, data_dir=tmp_path / "nowhere")


class TestSettings:
    @pytest.mark.parametrize(
        "setting",
        [
            {"augment": "mixup"},
            {"test_size": 0},
            {"test_size": "half"},
            {"unreadable": "ignore"},
            {"split_seed": -1},
            {"split_seed": "x"},
            {"epochs": "x"},
            {"dataset": 7},
        ],
    )
    def test_a_value_that_cannot_be_used_is_named(self, setting):
        with pytest.raises(ConfigError, match=f"task.{next(iter(setting))}="):
            vtab(**setting)

    def test_an_unknown_interpolation(self, small_set, tmp_path):
        for dataset in ("eurosat", "dsprites_location"):
            with pytest.raises(ConfigError, match="'cubic' is unknown; choose one of nearest, bilinear, bicubic"):
                vtab(dataset).load(image_size=8, data_dir=tmp_path, interpolation="cubic")

    @pytest.mark.parametrize("path", sorted((CONFIGS / "task").glob("*.yaml")), ids=lambda path: path.stem)
    def test_every_task_config_builds_its_task_and_says_how_to_run_it(self, path):
        assert path.read_text().startswith(f"# python train.py task={path.stem}")
        with initialize_config_dir(str(CONFIGS), version_base=None):
            config = compose("train", [f"task={path.stem}"]).task
        task = instantiate(config)
        assert (task.name, task.dataset, task.epochs) == (path.stem, config.dataset, config.epochs)
        if path.stem not in (
            "detect",
            "instruct",
            "oriented",
            "segment",
        ):  # no single labels, or of what has been loaded alone
            assert task.metric in task.metrics().compute(predictions=[0], references=[0])


@pytest.mark.data
class TestRealData:
    # Rows and classes by the notes of the data folder; the official splits are larger.
    COUNTS = {
        "eurosat": (800, 200, 2000, 10),
        "caltech101": (800, 200, 2000, 102),
        "cifar10": (800, 200, 2000, 10),
        "dtd10": (576, 144, 480, 10),
        "rsscn7": (800, 200, 1800, 7),
    }

    @pytest.mark.parametrize("dataset", COUNTS)
    def test_counts_and_pixels(self, data_folder, dataset):
        splits = vtab(dataset).load(image_size=64, data_dir=data_folder)
        *rows, classes = self.COUNTS[dataset]
        assert [len(s) for s in (splits.train, splits.validation, splits.test)] == rows
        assert splits.num_classes == len(splits.class_names) == classes
        assert splits.facts["split_rule"] == "as in the files"
        # The draw left two rare Caltech classes without a test image.
        assert len(torch.unique(splits.test.labels)) == (100 if dataset == "caltech101" else classes)

        source = pq.read_table(data_folder / dataset / "test.parquet").to_pylist()
        for row in (0, 7, len(source) - 1):
            image = Image.open(io.BytesIO(source[row]["image"]["bytes"])).convert("RGB")
            expected = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC))
            assert np.array_equal(splits.test.images[row].permute(1, 2, 0), expected)
            assert splits.test.labels[row] == source[row]["label"]

    def test_cifar10_is_balanced_and_eurosat_names_its_classes(self, data_folder):
        cifar = vtab("cifar10").load(image_size=32, data_dir=data_folder)
        assert torch.bincount(cifar.test.labels).min() > 150
        eurosat = vtab("eurosat").load(image_size=32, data_dir=data_folder)
        assert eurosat.class_names[:2] == ["AnnualCrop", "Forest"]


def rewrite(path: Path, column: str, values: pa.Array) -> None:
    table = pq.read_table(path).replace_schema_metadata(None)
    pq.write_table(table.set_column(table.schema.names.index(column), column, values), path)


@pytest.fixture
def small_set(write_split) -> dict[str, Path]:
    sizes = {"train": (30, 0), "validation": (10, 100), "test": (20, 200)}
    return {split: write_split(split, rows, start) for split, (rows, start) in sizes.items()}
