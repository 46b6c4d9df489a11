"""Images decoded batch by batch: the same wherever that is done, and what happens to those that cannot be."""

import itertools
import multiprocessing
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flora.errors import DataError
from flora.methods import Full
from flora.tasks.images import lazy
from flora.tasks.images.decode import as_rgb
from flora.tasks.metrics import TopFive
from flora.training import Protocol, Run, TrainerSettings
from flora.training.parts import Part
from tests.tasks.imagefolder.folders import crops, load, numbers, photographs, task, write_tree
from tests.training.test_run import ToyModel

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


@pytest.mark.parametrize(("seconds", "in_threads"), [(0.0, 9), (1e9, 0)])
def test_threads_open_images_that_take_long_and_give_the_same(tmp_path, monkeypatch, seconds, in_threads):
    """All but the first of ten, which tells how long one takes."""
    photographs(tmp_path)
    train = load(tmp_path).train
    expected = crops(train, 3, 1, range(10))
    decode, seen = train._decode, []
    monkeypatch.setattr(train, "_decode", lambda row: seen.append(threading.current_thread()) or decode(row))
    monkeypatch.setattr(lazy, "_SHORT", seconds)
    assert torch.equal(crops(train, 3, 1, range(10)), expected)
    assert sum(thread is not threading.main_thread() for thread in seen) == in_threads


def test_a_small_batch_of_images_that_take_long_is_opened_by_threads(tmp_path, monkeypatch):
    """Three of four wait for each other: they must be opened at the same time."""
    photographs(tmp_path)
    train, together, asked = load(tmp_path).train, threading.Barrier(3), itertools.count()

    def decode(row):
        if next(asked):
            together.wait(timeout=20)
        else:
            time.sleep(0.02)
        return np.zeros((3, 8, 8), np.uint8)

    monkeypatch.setattr(train, "_decode", decode)
    monkeypatch.setattr(lazy, "threads", lambda process: ThreadPoolExecutor(3))
    assert len(train.__getitems__(range(4))["labels"]) == 4


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
    augmenting = task(auto_augment="rand-m9-mstd0.5-inc1", mixup=0.2)
    settings = TrainerSettings(epochs=2, lr=1e-2, batch_size=4, num_workers=workers, log_every=1, **settings)
    protocol = Protocol("holdout", "last", "train")
    splits = augmenting.load_for(Network(), data)
    return Run(augmenting, Network(), Full("full"), settings, protocol, splits, 0, folder)


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
    assert multiprocessing.active_children() == [], "their processes end with the training"
    of = {"train": 0, "validation": 0, "test": 1}
    assert run.splits.facts["unreadable"] == {"policy": "skip", "skipped": 1, "first": [str(broken)], "of": of}


def test_an_image_that_stands_in_for_a_batch_without_any_is_not_scored(tmp_path):
    photographs(tmp_path / "data")
    metrics = []
    for mend in (lambda path: path.write_bytes(path.read_bytes()[:90]), Path.unlink):
        mend(tmp_path / "data" / "val" / "ant" / "3.png")
        run = trained(tmp_path / "run", tmp_path / "data", 0, eval_batch_size=1)
        run.task = task(unreadable="skip")
        run.splits = run.task.load_for(Network(), tmp_path / "data")
        (tmp_path / "run").mkdir(exist_ok=True)
        outcome = run.train()
        assert outcome.trainer.metric.confusion.sum(axis=1).tolist() == [5, 6]
        metrics.append(outcome.metrics)
    assert metrics[0] == metrics[1]


def test_unreadable_images_are_an_error_or_counted(tmp_path):
    write_tree(tmp_path)
    broken = sorted(tmp_path.rglob("val/ant/*.png"))[3]
    broken.write_bytes(broken.read_bytes()[:20])
    with pytest.raises(DataError, match=r"0023\.png: image cannot be decoded"):
        numbers(load(tmp_path).test)
    skipping = task(unreadable="skip")
    splits = skipping.load(image_size=16, data_dir=tmp_path)
    assert 23 not in numbers(splits.test)
    assert splits.test[3]["pixel_values"][1, 0, 0] == 24  # no batch is empty
    parts = [Part(splits.test, each=1).__getitems__([index]) for index in (3, 4)]
    assert [bool(part["counts"]) for part in parts] == [False, True]  # the same image
    metric = TopFive()
    metric.compute(predictions=np.eye(2)[[0, 1]], references=[0, 1])
    skipping.report(metric, splits, tmp_path)
    of = {"train": 0, "validation": 0, "test": 1}
    assert splits.facts["unreadable"] == {"policy": "skip", "skipped": 1, "first": [str(broken)], "of": of}
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
        pixels = np.asarray(as_rgb(catalogue.openers[rows[name]], name))
        assert (pixels == np.array([[0, 64], [128, 255]])[..., None]).all()
    with pytest.raises(DataError, match="mode F have no fixed range: save it with 8 or 16 bits"):
        as_rgb(catalogue.openers[rows["0002.tiff"]], "0002.tiff")
