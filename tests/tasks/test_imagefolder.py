"""Folders of images: what is read and held out, what is done to training images, bad images, top-5, the picture."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flora.models
from flora.errors import ConfigError, DataError
from flora.methods import Full
from flora.tasks import ImageFolder
from flora.tasks.imagefolder import draw_confusion
from flora.tasks.images import as_rgb
from flora.tasks.metrics import TopFive
from flora.tasks.mix import boxes, erase, mix
from flora.training import Protocol, Run, TrainerSettings
from flora.training.parts import Part
from tests.training.test_run import ToyModel

from .conftest import png


def write_tree(folder, splits=("train", "val"), classes=("ant", "bee"), each=10, start=0):
    for split in splits:
        for name in classes:
            for _ in range(each):
                path = folder / split / name / f"{start:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(start, (16, 16)))
                start += 1


def task(**options):
    return ImageFolder(**{"name": "imagefolder", "dataset": ".", "epochs": 1, "crop_pct": 1.0} | options)


def load(folder, **options):
    return task(**options).load(image_size=16, data_dir=folder)


def numbers(split):
    images = split.__getitems__(list(range(len(split))))["pixel_values"]
    return [int(image[0, 0, 0]) * 100 + int(image[1, 0, 0]) for image in images]


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


def crops(split, seed, epoch, indices=(0,)):
    split.begin_epoch(seed, epoch)
    return split.__getitems__(list(indices))["pixel_values"]


def photographs(folder, each=6):
    """Images in which a crop, a flip or a shade can be seen."""
    chance = np.random.RandomState(0)
    for place in [folder / split / name for split in ("train", "val") for name in ("ant", "bee")]:
        place.mkdir(parents=True)
        for number in range(each):
            Image.fromarray(chance.randint(0, 256, (24, 32, 3), np.uint8)).save(place / f"{number}.png")


POLICIES = [{}, {"auto_augment": "rand-m9-mstd0.5-inc1"}, {"auto_augment": "augmix-m3"}, {"color_jitter": 0.4}]


@pytest.mark.parametrize("options", POLICIES)
def test_what_is_done_to_an_image_depends_on_the_seed_the_epoch_and_the_image_alone(tmp_path, options):
    photographs(tmp_path)
    train = load(tmp_path, **options).train
    every = list(range(len(train)))
    once = crops(train, 3, 1, every)
    np.random.seed(77)
    assert torch.equal(crops(train, 3, 1, every), once), "whatever the threads did"
    assert torch.equal(crops(load(tmp_path, **options).train, 3, 1, every[::-1]), once.flip(0)), "in any order"
    assert torch.equal(torch.cat([crops(train, 3, 1, [i]) for i in every]), once), "in any batch"
    whole = train.subset(4)
    kept = [int(np.flatnonzero(train.rows == row)[0]) for row in whole.rows]
    assert torch.equal(crops(whole, 3, 1, range(4)), once[kept]), "in any subset"
    for seed, epoch in ((3, 2), (4, 1)):
        other = crops(train, seed, epoch, every)
        assert sum(torch.equal(a, b) for a, b in zip(once, other, strict=True)) <= 1


def test_augmentation_leaves_the_random_numbers_of_the_process_alone(tmp_path):
    photographs(tmp_path)
    train = load(tmp_path, auto_augment="rand-m9-mstd0.5-inc1", color_jitter=None).train
    drawn = []
    for read in (True, False):
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        if read:
            crops(train, 0, 0, range(len(train)))
        drawn.append((torch.rand(2).tolist(), np.random.rand(), random.random()))
    assert drawn[0] == drawn[1]


class Network(ToyModel):
    """Takes images of the size that they have here."""

    image_size, interpolation = 16, "bilinear"


def trained(folder, data, workers, **settings):
    one = task(auto_augment="rand-m9-mstd0.5-inc1", mixup=0.2)
    settings = TrainerSettings(epochs=2, lr=1e-2, batch_size=4, num_workers=workers, log_every=1, **settings)
    protocol = Protocol("holdout", "last", "train")
    splits = one.load_for(Network(), data)
    return Run(one, Network(), Full("full"), settings, protocol, splits, 0, folder)


def weights(outcome):
    return {name: tensor.numpy().tobytes() for name, tensor in outcome.adapted.model.state_dict().items()}


def test_runs_are_bit_equal_whoever_reads_the_images_and_wherever_they_were_resumed(tmp_path):
    photographs(tmp_path / "data")
    run = trained(tmp_path / "0", tmp_path / "data", 0)
    calm = run.train()
    assert run.splits.train.moment == (0, 1), "seed, and last epoch"
    assert weights(trained(tmp_path / "1", tmp_path / "data", 0).train()) == weights(calm)
    assert weights(trained(tmp_path / "2", tmp_path / "data", 2).train()) == weights(calm)

    class Killed(BaseException):
        pass

    def kill(callback, args, state, control, **kwargs):
        if state.global_step == 5:  # within the second epoch
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flora.training.callbacks.StepMeter.on_step_end", kill, raising=False)
        with pytest.raises(Killed):
            trained(tmp_path / "3", tmp_path / "data", 0, checkpoint_every=1).train()
    resumed = trained(tmp_path / "3", tmp_path / "data", 2, checkpoint_every=1).train()
    assert resumed.trainer.resumed_at == [4]
    assert weights(resumed) == weights(calm)


def test_images_that_worker_processes_skip_are_counted(tmp_path):
    photographs(tmp_path / "data")
    broken = tmp_path / "data" / "val" / "ant" / "3.png"
    broken.write_bytes(broken.read_bytes()[:90])
    run = trained(tmp_path / "run", tmp_path / "data", 2)
    run.task = task(unreadable="skip")
    run.splits = run.task.load_for(Network(), tmp_path / "data")
    (tmp_path / "run").mkdir()
    run.train()
    assert run.splits.facts["unreadable"] == {"policy": "skip", "skipped": 1, "first": [str(broken)]}


def test_an_image_that_stands_in_for_a_batch_without_any_is_not_scored(tmp_path):
    photographs(tmp_path / "data")
    found = []
    for mend in (lambda path: path.write_bytes(path.read_bytes()[:90]), Path.unlink):
        mend(tmp_path / "data" / "val" / "ant" / "3.png")
        run = trained(tmp_path / "run", tmp_path / "data", 0, eval_batch_size=1)
        run.task = task(unreadable="skip")
        run.splits = run.task.load_for(Network(), tmp_path / "data")
        (tmp_path / "run").mkdir(exist_ok=True)
        outcome = run.train()
        assert outcome.trainer.metric.confusion.sum(axis=1).tolist() == [5, 6]
        found.append(outcome.metrics)
    assert found[0] == found[1]


def test_unreadable_images_are_an_error_or_counted(tmp_path):
    write_tree(tmp_path)
    broken = sorted(tmp_path.rglob("val/ant/*.png"))[3]
    broken.write_bytes(broken.read_bytes()[:20])
    with pytest.raises(DataError, match=r"0023\.png: image cannot be decoded"):
        numbers(load(tmp_path).test)
    one = task(unreadable="skip")
    splits = one.load(image_size=16, data_dir=tmp_path)
    assert 23 not in numbers(splits.test)
    assert splits.test[3]["pixel_values"][1, 0, 0] == 24  # no batch is empty
    parts = [Part(splits.test, each=1).__getitems__([index]) for index in (3, 4)]
    assert [bool(part["counts"]) for part in parts] == [False, True]  # the same image
    metric = TopFive()
    metric.compute(predictions=np.eye(2)[[0, 1]], references=[0, 1])
    one.report(metric, splits, tmp_path)
    assert splits.facts["unreadable"] == {"policy": "skip", "skipped": 1, "first": [str(broken)]}
    assert (tmp_path / "confusion.png").stat().st_size > 1000


def test_where_no_image_can_be_decoded_skipping_them_ends(tmp_path):
    write_tree(tmp_path)
    for path in tmp_path.rglob("val/*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"0020\.png, 1 more of its batch and those after it: none can be decoded"):
        load(tmp_path, unreadable="skip").test.__getitems__([0, 1])


def test_images_with_16_bits_keep_their_greys_and_those_without_a_range_are_refused(tmp_path):
    write_tree(tmp_path)
    grey = np.array([[0, 0x4000], [0x8000, 0xFFFF]], np.uint16)
    place = tmp_path / "val" / "ant"
    Image.fromarray(grey).save(place / "0000.png")
    Image.fromarray(grey.astype(">u2")).save(place / "0001.tiff")
    Image.fromarray(np.float32(grey)).save(place / "0002.tiff")
    catalogue = load(tmp_path).test.catalogue
    rows = {name.rpartition("/")[2]: row for row, name in enumerate(catalogue.names)}
    for name in ("0000.png", "0001.tiff"):
        found = np.asarray(as_rgb(catalogue.openers[rows[name]], name))
        assert (found == np.array([[0, 64], [128, 255]])[..., None]).all()
    with pytest.raises(DataError, match="mode F have no fixed range: save it with 8 or 16 bits"):
        as_rgb(catalogue.openers[rows["0002.tiff"]], "0002.tiff")


def test_only_what_is_seen_in_a_folder_counts(tmp_path):
    """Jupyter leaves hidden folders behind, and a folder may be named like an image."""
    write_tree(tmp_path)
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "train" / "ant" / "old.png").mkdir()
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
    with pytest.raises(DataError, match="needs train and val or test"):
        load(tmp_path / "val")
    write_tree(tmp_path / "one", classes=("ant",))
    with pytest.raises(DataError, match="one has one class, ant: there is nothing to tell apart"):
        load(tmp_path / "one")


@pytest.mark.parametrize("model", ["minilm_l6", "llava_mini"])
def test_models_that_do_not_classify_images_are_refused(tmp_path, model):
    write_tree(tmp_path)
    with pytest.raises(ConfigError, match=f"model={model} does not classify images"):
        task().load_for(flora.models.get(model), tmp_path)


@pytest.mark.parametrize("option", [{"mixup": -1}, {"random_erasing": 2}, {"held_out": 1.5}, {"unreadable": "maybe"}])
def test_settings_out_of_range_are_refused(option):
    with pytest.raises(ConfigError, match=f"task.{next(iter(option))}="):
        task(**option)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_labels_say_how_much_of_each_image_is_left(mixup, cutmix):
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16)  # image i is i everywhere
    labels = torch.tensor([0, 1, 2, 3])
    shares = []
    for _ in range(50):
        mixed, soft = mix(images, labels, 4, mixup, cutmix)
        expected = soft @ torch.arange(4.0)  # the mean of an image is that of its labels
        assert torch.allclose(mixed.mean((1, 2, 3)), expected, atol=1e-5)
        assert torch.allclose(soft.sum(1), torch.ones(4))
        shares.append(soft[0, 0].item())
        if not mixup:
            assert set(mixed[0].unique().tolist()) <= {0.0, 3.0}, "CutMix blends nothing"
    assert np.std(shares) > 0.1


def test_no_mixing_leaves_images_alone():
    images, labels = torch.randn(3, 3, 8, 8), torch.tensor([1, 0, 1])
    same, soft = mix(images, labels, 2, 0.0, 0.0)
    assert same is images
    assert soft.tolist() == [[0, 1], [1, 0], [0, 1]]


def test_erasing_hides_between_nothing_and_a_third():
    images = torch.full((200, 3, 32, 32), 100.0)
    hidden = (erase(images, 1.0) != 100).float().mean((1, 2, 3))
    assert hidden.max() < 0.36
    assert hidden.mean() > 0.05
    assert (erase(images, 0.0) == 100).all()
    touched = (erase(images, 0.25) != 100).flatten(1).any(1).float().mean()
    assert 0.1 < touched < 0.4


def test_a_box_covers_its_area():
    area, ratio = torch.full((500,), 0.04), torch.ones(500)
    covered = boxes(area, ratio, torch.empty(1, 3, 64, 64)).float().mean((1, 2, 3))
    assert covered.max().item() == pytest.approx(0.04, abs=0.005)


def test_mixed_labels_reach_the_loss():
    torch.manual_seed(0)
    one = task(mixup=0.8)
    one._num_classes = 3
    batch = {"pixel_values": torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "labels": torch.tensor([0, 1, 2, 0])}
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
    logits = one.forward(flora.models.get("convnext"))(module, batch, True)
    assert batch["labels"].shape == (4, 3)
    expected = -(batch["labels"] * torch.log_softmax(logits, 1)).sum(1).mean()
    assert one.loss(logits, batch["labels"], 0.0).item() == pytest.approx(expected.item(), abs=1e-6)


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
