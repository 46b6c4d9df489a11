"""Conversations with their images: in their places, on a square, or unreadable."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from flora.errors import DataError
from flora.tasks.vqa.dialogues import Pictures
from tests.tasks.chats import tiny_llava
from tests.tasks.conftest import png
from tests.tasks.vqa.questions import conversation, task, write_conversations, write_questions

IMAGE, NOT = 4, -100


def test_images_stand_in_their_places_and_text_needs_none(tmp_path):
    entries = [
        conversation("what is it?\n<image>", "a dog", image="1.png"),
        conversation("is it a dog?", "yes"),
        conversation("<image><image>\nis it red?", "no", "is it blue?", "yes", image=["0.png", "1.png"]),
    ]
    folder = tmp_path / "llava_instruct"
    write_conversations(folder, entries)
    write_conversations(folder, entries, "test")
    spec = tiny_llava(tmp_path)
    splits = task("llava_instruct", validation_size=1).load_for(spec, tmp_path)
    test = splits.test
    batch = test.__getitems__([2, 1, 0])
    assert (batch["input_ids"] == IMAGE).sum(1).tolist() == [8, 0, 4]
    assert batch["pixel_values"][:, 1, 32, 32].tolist() == [0, 1, 1]  # what png() spells: two images, then one
    assert "pixel_values" not in test.__getitems__([1])
    words = spec.tokenizer().convert_ids_to_tokens(test[0]["input_ids"][0].tolist())
    assert words[words.index("<reponame>") - 1] == "\n", "LLaVA shows the image before the question"
    assert len(test.pictures.openers) == 2, "each file is known once"
    assert splits.facts["counts"] == {"train": 2, "validation": 1, "test": 3}


@pytest.mark.parametrize("damage", [png(1)[:40], b""])
def test_an_image_that_cannot_be_decoded_is_an_error_or_skipped_and_counted(tmp_path, damage):
    cells = [{"bytes": png(i) if i else damage, "path": None} for i in range(4)]
    for split in ("train", "test"):
        write_questions(tmp_path / "pets", split, rows=4, image=cells)
    spec = tiny_llava(tmp_path)
    splits = task(validation_size=1).load_for(spec, tmp_path)
    with pytest.raises(DataError, match=r"row 0: image cannot be decoded .*task\.unreadable=skip"):
        splits.test.__getitems__([0, 1])
    mine = task(validation_size=1, unreadable="skip")
    splits = mine.load_for(spec, tmp_path)
    batch = splits.test.__getitems__([0, 1, 2])
    assert len(batch["input_ids"]) == len(batch["labels"]) == len(batch["pixel_values"]) == 2
    alone = splits.test.__getitems__([0])  # no batch is empty
    assert torch.equal(alone["pixel_values"], splits.test.__getitems__([1])["pixel_values"])
    assert not alone["counts"]
    metric = mine.metrics()
    metric.compute(predictions=np.array([[2]]), references=batch["labels"][:1].numpy())
    mine.report(metric, splits, tmp_path)
    assert splits.facts["unreadable"]["skipped"] == 1
    for index in range(len(splits.train)):  # something has to be trained on
        assert "counts" not in splits.train.__getitems__([index])


def test_a_file_that_is_missing_is_said_at_once_and_one_that_goes_later_cannot_be_decoded(tmp_path):
    folder = tmp_path / "llava_instruct"
    for split in ("train", "validation", "test"):
        write_conversations(folder, [conversation("<image>\nis it?", "yes", image="9.png")], split)
    with pytest.raises(
        DataError, match=r"images/9\.png is missing in .*images: correct task\.images, or set task\.unread"
    ):
        task("llava_instruct").load_for(tiny_llava(tmp_path), tmp_path)
    (folder / "images" / "9.png").write_bytes(png(9))
    splits = task("llava_instruct").load_for(tiny_llava(tmp_path), tmp_path)
    (folder / "images" / "9.png").unlink()
    with pytest.raises(DataError, match=r"images/9\.png: image cannot be decoded \(.*No such file"):
        splits.test.__getitems__([0])


def test_images_keep_their_shape_on_a_square_of_their_mean_colour(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), (250, 0, 0)).save(buffer, "PNG")
    for split in ("train", "test"):
        cells = [{"bytes": buffer.getvalue(), "path": None}, {"bytes": png(1), "path": None}] * 2
        write_questions(tmp_path / "pets", split, rows=4, image=cells)
    spec = tiny_llava(tmp_path, mean=(0.5, 0.5, 0.5), interpolation="nearest")
    pixels = task().load_for(spec, tmp_path).test.__getitems__([0])["pixel_values"][0]
    assert pixels[:, 0, 32].tolist() == pixels[:, -1, 32].tolist() == [127, 127, 127]
    assert pixels[:, 32, 0].tolist() == pixels[:, 32, -1].tolist() == [250, 0, 0]
    assert int((pixels[0] == 250).sum()) == 64 * 32


def test_the_facts_hold_a_checksum_of_the_images_that_a_list_names(tmp_path):
    entries = [conversation("<image>\nwhat is it?", "a dog", image="0.png")]
    for split in ("train", "validation", "test"):
        write_conversations(tmp_path, entries, split)

    def checksum():
        return task(".")._read_files(tmp_path, Pictures())[1]["images"]["sha256"]

    before = checksum()
    (tmp_path / "images" / "1.png").write_bytes(b"is in no list")
    assert checksum() == before
    (tmp_path / "images" / "0.png").write_bytes((tmp_path / "images" / "0.png").read_bytes() + b"more")
    assert checksum() != before
