"""Folders of images: what is read and held out, what is done to training images, top-5, the picture, bad folders."""

import numpy as np
import pytest
import torch
from PIL import Image

import flora.models
from flora.config import composed
from flora.errors import ConfigError, DataError
from flora.tasks.imagefolder.confusion import draw_confusion
from flora.tasks.metrics import TopFive
from tests.tasks.conftest import png
from tests.tasks.imagefolder.folders import crops, load, numbers, task, write_tree


def test_without_a_test_folder_val_is_the_test_and_a_part_of_train_is_held_out(tmp_path):
    write_tree(tmp_path)
    splits = load(tmp_path, held_out=0.25)
    parts = [numbers(part) for part in (splits.train, splits.validation, splits.test)]
    assert sorted(parts[0] + parts[1]) == list(range(20))
    assert len(parts[1]) == 5
    assert parts[2] == list(range(20, 40))
    assert splits.class_names == ["ant", "bee"]
    assert splits.test.labels.tolist() == [0] * 10 + [1] * 10
    assert "validation a drawn 25% of train" in splits.facts["split_rule"]


def test_three_folders_are_taken_as_they_are(tmp_path):
    write_tree(tmp_path, ("train", "val", "test"))
    splits = load(tmp_path)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [20, 20, 20]
    assert splits.facts["split_rule"] == "as in the files"


def test_parquet_is_read_as_well(write_split, tmp_path):
    write_split("train-00000-of-00001", 30, folder="data")
    write_split("validation", 10, start=100, folder="data")
    splits = load(tmp_path, dataset="data", classes=10)
    assert numbers(splits.test) == list(range(100, 110))
    assert splits.facts["files"]["validation.parquet"]["rows"] == 10
    assert splits.train.subset(4).labels.tolist() == [n % 10 for n in numbers(splits.train.subset(4))]


def test_training_images_are_cropped_and_evaluated_ones_are_not(tmp_path):
    write_tree(tmp_path)
    for path in tmp_path.rglob("*.png"):
        side = np.tile(np.arange(16, dtype=np.uint8) * 16, (16, 1))
        Image.fromarray(np.stack([side] * 3, -1)).save(path)
    splits = load(tmp_path)
    plain = splits.test.__getitems__([0, 1])["pixel_values"]
    assert torch.equal(plain[0], plain[1])
    assert plain.dtype == torch.uint8
    assert len({crops(splits.train, 0, epoch)[0].numpy().tobytes() for epoch in range(8)}) > 1
    whole = load(tmp_path, augment="none").train.__getitems__([0])["pixel_values"]
    assert torch.equal(whole[0], plain[0])


def test_only_what_is_seen_in_a_folder_counts(tmp_path):
    """Jupyter leaves hidden folders, macOS a ``._NAME`` for each file, and a folder may be named like an image."""
    write_tree(tmp_path)
    known = task().contents(tmp_path)
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "train" / "ant" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "train" / "ant" / ".ipynb_checkpoints" / "0001.png").write_bytes(b"")
    (tmp_path / "train" / "ant" / "._0000.png").write_bytes(b"Mac OS X")
    (tmp_path / "train" / "ant" / "old.png").mkdir()
    assert task().contents(tmp_path) == known
    splits = load(tmp_path)
    assert splits.class_names == ["ant", "bee"]
    assert len(splits.train.catalogue.names) == 40


def test_dollars_in_names_of_classes_are_no_formula(tmp_path):
    draw_confusion(np.eye(2, dtype=int), ["$1_2_3$", r"$\bill$"], tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, {"classes": 3}, r"has 2 classes, task\.classes=3"),
        (None, {"dataset": "nowhere"}, "there is no folder .*nowhere"),
        (None, {"held_out": 0.0}, "leaves a split empty"),
        (("val", "wasp"), {}, "class wasp is not in train"),
    ],
)
def test_folders_that_do_not_fit(tmp_path, change, options, message):
    write_tree(tmp_path)
    if change:
        write_tree(tmp_path, change[:1], change[1:])
    with pytest.raises(DataError, match=message):
        load(tmp_path, **options)
    write_tree(tmp_path / "lone", ("val",))
    with pytest.raises(DataError, match="lone has no train beside validation: add it"):
        load(tmp_path / "lone")
    write_tree(tmp_path / "one", classes=("ant",))
    with pytest.raises(DataError, match="one has one class, ant: there is nothing to tell apart"):
        load(tmp_path / "one")


def flat(folder, **counts):
    for start, (name, count) in enumerate(counts.items()):
        write_tree(folder, (".",), (name,), count, 100 * start)


def test_a_flat_folder_of_classes_is_drawn_class_by_class_and_says_so(tmp_path, capsys):
    flat(tmp_path, ant=20, bee=40, cat=3)
    splits = load(tmp_path)
    said = capsys.readouterr().err
    assert "no validation and no test: drawn 70/15/15 % train/validation/test of each class, seed 0" in said
    assert "(43 train, 10 validation, 10 test)" in said
    assert said.count("\n") == 1
    assert splits.facts["split_rule"] == "drawn 70/15/15 % train/validation/test of each class, seed 0"
    parts = {split: getattr(splits, split) for split in ("train", "validation", "test")}
    assert sorted(n for part in parts.values() for n in numbers(part)) == [
        *range(20),
        *range(100, 140),
        *range(200, 203),
    ]
    assert {split: np.bincount(part.labels).tolist() for split, part in parts.items()} == {
        "train": [14, 28, 1],
        "validation": [3, 6, 1],
        "test": [3, 6, 1],
    }
    assert numbers(splits.validation) == [6, 12, 19, 103, 104, 116, 118, 128, 130, 200], "on every machine"
    assert splits.drawn["validation"][2:4] == ["ant/0019.png", "bee/0103.png"]
    assert {split: len(names) for split, names in splits.drawn.items()} == splits.facts["counts"]
    assert numbers(load(tmp_path, split_seed=1).test) != numbers(splits.test)
    halves = load(tmp_path, split=[2, 1, 1])
    assert [len(getattr(halves, split)) for split in parts] == [31, 16, 16]


def test_train_alone_is_drawn_too_and_a_split_that_is_there_is_not_drawn_again(tmp_path):
    write_tree(tmp_path, ("train",))
    assert load(tmp_path).facts["counts"] == {"train": 12, "validation": 4, "test": 4}
    write_tree(tmp_path, ("val",))
    with pytest.raises(
        ConfigError, match=r"task\.split=\[8, 1, 1\]: .* has train and validation already; leave it out"
    ):
        load(tmp_path, split=[8, 1, 1])


@pytest.mark.parametrize("split", [[1, 2], [1, 0, 1], "even", [1, 1, True], [1, 1, float("inf")]])
def test_a_split_is_three_numbers(split):
    with pytest.raises(ConfigError, match=r"task\.split=.* must be three numbers above zero"):
        task(split=split)


def test_classes_too_small_to_divide_stay_in_train(tmp_path, capsys):
    flat(tmp_path, ant=10, bee=2, cat=1)
    splits = load(tmp_path)
    assert [
        np.bincount(part.labels, minlength=3).tolist() for part in (splits.train, splits.validation, splits.test)
    ] == [
        [6, 1, 1],
        [2, 0, 0],
        [2, 1, 0],
    ]
    assert splits.facts["warnings"] == [
        "validation has no example of 2 of 3 classes (bee, cat)",
        "test has no example of 1 of 3 classes (cat)",
    ]
    assert "test has no example of 1 of 3 classes (cat); its metrics are over the others" in capsys.readouterr().err
    flat(tmp_path / "tiny", ant=2, bee=2)
    with pytest.raises(DataError, match="no class has the three images that validation needs"):
        load(tmp_path / "tiny")


def test_a_class_that_is_missing_in_validation_is_said_and_one_missing_in_train_is_an_error(tmp_path, write_split):
    write_tree(tmp_path, ("train",), ("ant", "bee", "cat"))
    write_tree(tmp_path, ("val",), ("ant", "cat"))
    splits = load(tmp_path)
    assert "test has no example of 1 of 3 classes (bee)" in splits.facts["warnings"]
    scores = task().metrics().compute(predictions=np.eye(3)[splits.test.labels], references=splits.test.labels)
    assert scores["mean_per_class_accuracy"] == 1.0
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(DataError, match="dog has no image, and would be a class: add some, or remove the folder"):
        load(tmp_path)
    write_split("train", 9, folder="data", labels=[n % 9 for n in range(9)])
    write_split("test", 10, folder="data")
    with pytest.raises(DataError, match="class class 9 has no image in train"):
        load(tmp_path, dataset="data")


def test_numbered_classes_count_by_value_unless_the_run_is_of_before(tmp_path):
    write_tree(tmp_path, ("train", "val"), ("1", "2", "10"))
    assert load(tmp_path).class_names == ["1", "10", "2"]
    assert load(tmp_path, class_order="value").class_names == ["1", "2", "10"]
    assert composed(["task=imagefolder"]).task.class_order == "value"
    flat(tmp_path / "mixed", **{"1": 3, "b": 3, "10": 3})
    assert load(tmp_path / "mixed", class_order="value").class_names == ["1", "10", "b"]
    with pytest.raises(ConfigError, match=r"task\.class_order=size must be value or name"):
        task(class_order="size")


@pytest.mark.parametrize("option", [{"mixup": -1}, {"random_erasing": 2}, {"held_out": 1.5}, {"unreadable": "maybe"}])
def test_settings_out_of_range_are_refused(option):
    with pytest.raises(ConfigError, match=f"task.{next(iter(option))}="):
        task(**option)


@pytest.mark.parametrize("policy", ["junk", "", "rand", ["rand-m9"], 7])
def test_an_augmentation_that_is_none_is_refused_before_any_image_is_read(policy):
    if policy in ("", "rand"):  # off, and RandAugment with its defaults
        assert task(auto_augment=policy).auto_augment == policy
        return
    with pytest.raises(ConfigError, match=r"task\.auto_augment=.* is no augmentation of timm"):
        task(auto_augment=policy)


def test_a_class_that_no_font_can_write_costs_the_picture_not_the_run(tmp_path, capsys):
    for split in ("train", "val"):
        for name in ("ant", "b\udcffe"):  # a folder whose name is no UTF-8
            place = tmp_path / "data" / split / name
            place.mkdir(parents=True)
            for number in range(10):
                (place / f"{number}.png").write_bytes(png(number, (16, 16)))
    mine = task()
    splits = mine.load(image_size=16, data_dir=tmp_path / "data")
    metric = mine.metrics()
    metric.compute(predictions=np.eye(2), references=np.array([0, 1]))
    (tmp_path / "out").mkdir()
    mine.report(metric, splits, tmp_path / "out")
    assert splits.facts["unreadable"]["skipped"] == 0
    assert not list((tmp_path / "out").iterdir())
    assert "\nwarning: confusion.png is left out, it cannot be drawn (" in capsys.readouterr().err


def test_mixed_labels_reach_the_loss():
    torch.manual_seed(0)
    mixing = task(mixup=0.8)
    mixing._num_classes = 3
    batch = {"pixel_values": torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "labels": torch.tensor([0, 1, 2, 0])}
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
    forward = mixing.forward(flora.models.get("convnext"))
    logits, shares = forward(module, batch, True)
    assert shares.shape == (4, 3)
    assert batch["labels"].tolist() == [0, 1, 2, 0], "the batch stays as it is"
    expected = -(shares * torch.log_softmax(logits, 1)).sum(1).mean()
    assert mixing.loss(logits, shares, 0.0).item() == pytest.approx(expected.item(), abs=1e-6)


def test_top_five_counts_the_five_best_and_the_matrix_counts_confusions():
    logits = np.zeros((3, 8))
    logits[0, 2] = 9  # right
    logits[1, [0, 1, 3, 4]], logits[1, 2] = (5, 4, 3, 2), 1  # fifth guess
    logits[2, [0, 1, 3, 4, 5]] = 5  # not among five
    metric = TopFive()
    scores = metric.compute(predictions=logits, references=[2, 2, 2])
    assert scores["accuracy"] == pytest.approx(1 / 3)
    assert scores["top5_accuracy"] == pytest.approx(2 / 3)
    assert metric.confusion[2].tolist() == [2, 0, 1, 0, 0, 0, 0, 0]
    nan = np.full((1, 8), np.nan)
    assert TopFive().compute(predictions=nan, references=[7])["top5_accuracy"] == 0


def test_the_facts_hold_a_checksum_of_the_images_of_each_split(tmp_path):
    write_tree(tmp_path, splits=("train", "val", "test"))
    before = load(tmp_path).facts["sha256"]
    assert set(before) == {"train", "validation", "test"}
    assert load(tmp_path).facts["sha256"] == before
    write_tree(tmp_path, splits=("val",), each=1)  # an image more in each class
    after = load(tmp_path).facts["sha256"]
    assert {split for split in before if before[split] != after[split]} == {"validation"}


def spread(folder, counts, names=("ant", "bee")):
    """Folders of classes with so many images each, without splits."""
    for name, count in zip(names, counts, strict=True):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f"{number}.png").write_bytes(png(number, (16, 16)))


def test_what_could_not_be_decoded_counts_neither_as_training_nor_as_drawn(tmp_path, capsys):
    spread(tmp_path / "data", (20, 40))
    for number in range(30):
        (tmp_path / "data" / "bee" / f"{number}.png").write_bytes(b"broken")
    (tmp_path / "data" / "bee" / "photo.HEIC").write_bytes(b"of a phone")
    mine = task(unreadable="skip")
    splits = mine.load(image_size=16, data_dir=tmp_path / "data")
    assert "1 files are not used, as their names end in none of .jpg" in capsys.readouterr().err
    for part in (splits.train, splits.validation, splits.test):
        for index in range(len(part)):
            part.__getitems__([index])
    metric = mine.metrics()
    labels = splits.test.labels
    metric.compute(predictions=np.eye(2)[labels], references=labels)
    (tmp_path / "out").mkdir()
    mine.report(metric, splits, tmp_path / "out")
    assert sum(splits.facts["unreadable"]["of"].values()) == 30
    assert sum(map(len, splits.drawn.values())) == 60 - 30
    assert splits.facts["baseline"]["class"] == "ant", "bee has more files, and fewer pictures"


def test_a_run_is_tested_on_a_folder_that_lacks_one_of_its_classes(tmp_path, capsys):
    spread(tmp_path / "new", (4, 6), ("bee", "wasp"))
    mine = task()
    mine.whole_test, mine.trained_classes, mine.usual_class = True, ["ant", "bee", "wasp"], "bee"
    splits = mine.load(image_size=16, data_dir=tmp_path / "new")
    assert splits.class_names == ["ant", "bee", "wasp"]
    assert splits.test.labels.tolist() == [1] * 4 + [2] * 6
    assert splits.facts["counts"] == {"test": 10}
    assert "test has no example of 1 of 3 classes (ant)" in capsys.readouterr().err
    metric = mine.metrics()
    metric.compute(predictions=np.eye(3)[splits.test.labels], references=splits.test.labels)
    (tmp_path / "out").mkdir()
    mine.report(metric, splits, tmp_path / "out")
    assert splits.facts["baseline"] == {"class": "bee", "accuracy": 0.4}, "what training had most of"
