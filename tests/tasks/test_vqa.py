"""Instruction tuning: what is learnt token by token, images in their places, answers written, bad files named."""

import io
import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

import flora.models
from flora.errors import ConfigError, DataError
from flora.tasks import Instruct
from flora.tasks.prepare import find, prepare
from flora.tasks.vqa.coder import Coder
from flora.tasks.vqa.dialogues import Dialogue, Pictures, easy_vqa, plain, read_json, read_parquet
from flora.tasks.vqa.task import hold_out, majority
from tests.tasks.chats import tiny_llava
from tests.tasks.conftest import png
from tests.tasks.texts import write_rows

IMAGE, NOT = 4, -100
SYSTEM = ["<|im_start|>", "system", "\n", "<|im_end|>", "\n"]
ASSISTANT = ["<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]


def task(dataset="pets", **options):
    return Instruct(**{"name": "instruct", "dataset": dataset, "epochs": 1, "validation_size": 2} | options)


def write_questions(folder, split="train", rows=8, images=4, **columns):
    """Questions about numbered images, each image asked about several times; the path."""
    cells = [{"bytes": png(i % images), "path": None} for i in range(rows)]
    made = {
        "image": cells,
        "question": ["what color is it?"] * rows,
        "answer": [("red", "yes")[i % 2] for i in range(rows)],
    }
    return write_rows(folder / f"{split}.parquet", made | columns)


def write_conversations(folder, entries, split="train"):
    """LLaVA's JSON with images 0.png, 1.png; the path."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(2):
        (folder / "images" / f"{number}.png").write_bytes(png(number))
    path = folder / f"{split}.json"
    path.write_text(json.dumps(entries))
    return path


def entry(*turns, **more):
    speakers = ("human", "gpt")
    said = [{"from": speakers[i % 2], "value": value} for i, value in enumerate(turns)]
    return {"id": "7", "conversations": said} | more


@pytest.fixture
def pets(tmp_path):
    for split in ("train", "test"):
        write_questions(tmp_path / "pets", split)
    return tmp_path


def words_and_targets(spec, turns, images=1):
    """Every token of a conversation in words, and whether the loss is on it."""
    dialogue = Dialogue(tuple(turns), (0,) * images, (turns[-1][1],), "other", "here")
    rows = Coder(spec, None, 4).answered("train", [dialogue])
    tokenizer, example = spec.tokenizer(), rows[0]
    assert all(t in (i, NOT) for i, t in zip(example["input_ids"].tolist(), example["labels"].tolist(), strict=True))
    return [
        (tokenizer.convert_ids_to_tokens(i), t != NOT)
        for i, t in zip(example["input_ids"].tolist(), example["labels"].tolist(), strict=True)
    ]


def test_the_loss_is_on_answers_and_their_end_token_by_token_in_chatml(tmp_path):
    turns = [("<image>\nwhat color is it?", "red"), ("is it a dog?", "yes a dog")]
    found = words_and_targets(tiny_llava(tmp_path), turns)
    user = ["<|im_start|>", "user", "\n"]
    first = [*SYSTEM, *user, *["<reponame>"] * 4, "\n", "what", " color", " is", " it", "?", *ASSISTANT]
    second = ["\n", *user, "is", " it", "<|endoftext|>", " dog", "?", *ASSISTANT]  # " a" is unknown to this tokenizer
    assert found == [
        *((word, False) for word in first),
        *[("red", True), ("<|im_end|>", True)],
        *((word, False) for word in second),
        *[("yes", True), ("<|endoftext|>", True), (" dog", True), ("<|im_end|>", True)],
    ]


def test_the_loss_is_on_answers_and_their_end_token_by_token_in_vicuna(tmp_path):
    turns = [("<image>\nwhat color", "red"), ("what color is it?", "no")]
    found = words_and_targets(tiny_llava(tmp_path, "vicuna", grid=False), turns)
    system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    system += "detailed, and polite answers to the user's questions. USER:"
    told = [word for word, learnt in found if not learnt]
    assert [word for word, learnt in found if learnt] == ["▁red", "</s>", "▁no", "</s>"]
    assert told[0] == "<s>"
    assert told[1 : 1 + len(system.split())] == ["▁" + word for word in system.split()]
    rest = [word for word in told[1 + len(system.split()) :] if word not in ("▁", "<unk>")]  # "\nwhat" is one, unknown
    asked = ["▁USER:", "▁what", "▁color", "▁is", "▁it?", "▁ASSISTANT:"]
    assert rest == [*["<image>"] * 4, "▁color", "▁ASSISTANT:", *asked]
    order = [word for word, _ in found]
    assert order.index("▁red") == order.index("▁ASSISTANT:") + 1
    assert order[-3:] == ["▁ASSISTANT:", "▁no", "</s>"]


def test_a_question_to_be_answered_ends_where_the_answer_begins(pets, tmp_path):
    spec = tiny_llava(tmp_path)
    splits = task().load_for(spec, pets)
    batch = splits.test.__getitems__([1])
    words = spec.tokenizer().convert_ids_to_tokens(batch["input_ids"][0].tolist())
    assert words[-5:] == ASSISTANT
    assert "red" not in words
    assert batch["labels"].tolist() == [len(splits.validation) + 1]


def test_images_stand_in_their_places_and_text_needs_none(tmp_path):
    entries = [
        entry("what is it?\n<image>", "a dog", image="1.png"),
        entry("is it a dog?", "yes"),
        entry("<image><image>\nis it red?", "no", "is it blue?", "yes", image=["0.png", "1.png"]),
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


def test_the_training_loss_is_that_of_transformers(pets, tmp_path):
    spec, mine = tiny_llava(tmp_path), task()
    train = mine.load_for(spec, pets).train
    torch.manual_seed(0)
    model = spec.build(0).eval()
    batch = train.__getitems__(range(4))
    kept = batch["labels"].clone()
    outputs = mine.forward(spec)(model, batch, True)
    loss = mine.loss(outputs, batch["labels"], 0.0)
    total, tokens = 0.0, 0
    for index in range(4):  # one by one, without padding, under transformers' own loss
        one = train[index]
        images = spec.normalize(one["pixel_values"])
        with torch.no_grad():
            found = model(input_ids=one["input_ids"], pixel_values=images, labels=one["labels"]).loss
        count = int((one["labels"] != NOT).sum())
        total, tokens = total + float(found) * count, tokens + count
    assert int((kept != NOT).sum()) == tokens == 4 * 2
    assert loss.item() == pytest.approx(total / tokens, abs=1e-5)


def test_answers_are_the_likeliest_tokens_one_after_the_other(pets, tmp_path):
    """Left padding, the cache and the batch change nothing: compared with whole passes over single examples."""
    write_questions(pets / "pets", "test", question=["what color is it?", "is it?"] * 4)
    spec, mine = tiny_llava(tmp_path), task(max_new_tokens=5)
    test = mine.load_for(spec, pets).test
    torch.manual_seed(0)
    model = spec.build(0).eval()
    with torch.no_grad():
        for name, parameter in model.model.language_model.named_parameters():
            if "self_attn" in name:  # else the last token decides alone
                parameter.normal_()
    written = mine.forward(spec)(model, test.__getitems__([0, 1, 2]), False)
    for row, index in zip(written.tolist(), range(3), strict=True):
        one = test[index]
        ids, images = one["input_ids"], spec.normalize(one["pixel_values"])
        for token in row:
            with torch.no_grad():
                best = int(model(input_ids=ids, pixel_values=images).logits[0, -1].argmax())
            assert token == best
            if token == 2:
                break
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
    assert len({tuple(row) for row in written.tolist()}) > 1


def test_answers_are_scored_and_shown(pets, tmp_path):
    spec, mine = tiny_llava(tmp_path), task()
    splits = mine.load_for(spec, pets)
    vocabulary = spec.tokenizer().get_vocab()
    indices = torch.tensor([2, 3, 4])  # red, yes, red: the first two questions are of the validation split
    said = [["red", "<|im_end|>", "blue"], ["no", "<|im_end|>", "<|im_end|>"], ["red", "blue", "<|im_end|>"]]
    tokens = torch.tensor([[vocabulary[word] for word in row] for row in said])
    assert mine.loss(tokens, indices, 0.0).item() == pytest.approx(2 / 3)
    metric = mine.metrics()
    scores = metric.compute(predictions=tokens.numpy(), references=indices.numpy())
    assert scores["exact_match"] == pytest.approx(1 / 3)
    assert (scores["exact_match_other"], scores["exact_match_yes_no"]) == (0.5, 0.0)
    mine.report(metric, splits, tmp_path)
    with Image.open(tmp_path / "predictions.png") as sheet:
        assert min(sheet.size) > 500
    assert splits.facts["unreadable"] == {"policy": "error", "skipped": 0, "first": []}


def test_held_out_questions_share_no_image_with_those_of_training(tmp_path):
    write_questions(tmp_path / "pets", rows=40, images=10, answer=["red", "yes", "red", "red"] * 10)
    write_questions(tmp_path / "pets", "test")
    splits = task(validation_size=6).load_for(tiny_llava(tmp_path), tmp_path)
    shown = [{i for images in part.images for i in images} for part in (splits.train, splits.validation)]
    assert not shown[0] & shown[1]
    assert len(splits.validation) == 8, "two images, four questions each"
    assert splits.facts["counts"] == {"train": 32, "validation": 8, "test": 8}
    assert splits.facts["majority"] == {"answer": "red", "test": 0.5, "by_question": 0.5}
    with pytest.raises(DataError, match="40 conversations to train on, 40 to hold out"):
        task(validation_size=40).load_for(tiny_llava(tmp_path), tmp_path)


def test_what_is_right_without_looking_is_told():
    def asked(question, answer):
        return Dialogue(((question, answer),), (0,), (answer,), "other", "here")

    train = [asked(q, a) for q, a in ["ay", "ay", "an", "bn", "bn", "bn", "cy"]]
    test = [asked(q, a) for q, a in ["ay", "bn", "bn", "cn", "zn", "zy"]]
    assert majority(train, test) == {"answer": "n", "test": 4 / 6, "by_question": 4 / 6}
    assert majority(train, test[:3]) == {"answer": "n", "test": 2 / 3, "by_question": 1.0}


def test_long_texts_lose_words_never_images_or_the_answer(pets, tmp_path):
    question = "what " + "is " * 200
    for split in ("train", "validation", "test"):
        write_questions(pets / "pets", split, question=["what color is it?"] * 7 + [question])
    spec = tiny_llava(tmp_path)
    splits = task(max_length=60, max_new_tokens=10).load_for(spec, pets)
    assert splits.facts["truncated"] == {"train": 1, "validation": 1, "test": 1}
    cut = splits.test[7]["input_ids"][0]
    assert len(cut) == 50, "room is left for the answer"
    words = spec.tokenizer().convert_ids_to_tokens(cut.tolist())
    assert words.count("<reponame>") == 4
    assert words[-5:] == ASSISTANT
    learnt = splits.train[7]
    assert learnt["labels"].shape == (1, 60)
    assert spec.tokenizer().decode(learnt["labels"][0, -2:]).replace(" ", "") == "yes<|im_end|>"
    with pytest.raises(
        DataError, match=r"row 0: 12 tokens of images and earlier turns do not fit into 16; .*never cut"
    ):
        task(max_length=32, max_new_tokens=16).load_for(spec, pets)


def test_long_conversations_lose_their_last_turns(tmp_path):
    folder = tmp_path / "llava_instruct"
    long = entry("<image>\nis it?", "yes", "is it a dog?", "no", "what is it?", "a dog " * 60, image="0.png")
    answer = entry("is it?", "dog " * 300)
    write_conversations(folder, [long, answer])
    write_conversations(folder, [entry("is it?", "yes")], "validation")
    write_conversations(folder, [entry("is it?", "yes")], "test")
    spec = tiny_llava(tmp_path)
    splits = task("llava_instruct", max_length=64).load_for(spec, tmp_path)
    tokenizer = spec.tokenizer()
    learnt = [
        [tokenizer.convert_ids_to_tokens(int(t)) for t in splits.train[i]["labels"][0] if t != NOT] for i in (0, 1)
    ]
    assert learnt[0] == ["yes", "<|im_end|>", "no", "<|im_end|>"]
    assert splits.train.lengths[1] == 64
    assert learnt[1] == ["<|endoftext|>", *[" dog"] * (len(learnt[1]) - 1)], "the end of a cut answer is not learnt"
    assert splits.facts["truncated"]["train"] == 2


def test_a_tokenizer_without_a_pad_token_pads_with_the_end_which_masks_hide(pets, tmp_path):
    mine = task()
    splits = mine.load_for(tiny_llava(tmp_path, pad=None), pets)
    assert splits.facts["warnings"] == ["no pad token: the end token pads"]
    assert splits.train.rows.padding["input_ids"] == 2


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry("is it?")], r"entry 0 \(id 7\): turns must be human, gpt, human, gpt, .*here they are human;"),
        ([{"conversations": [{"from": "gpt", "value": "yes"}, {"from": "human", "value": "?"}]}], "are gpt, human"),
        ([{"conversations": [{"from": "gpt", "value": "yes"}]}], "here they are gpt;"),
        ([entry("is it?", "yes"), entry("is it?", " ")], "entry 1 .*turn 1 is ' ' instead of a text"),
        ([entry("<image>\nis it?", "yes")], "<image> occurs 1 times, but there are 0 images"),
        ([entry("is it?", "yes", image="0.png")], "<image> occurs 0 times, but there are 1 images"),
        ([entry("<image>\nis it?", "yes", image="../secret.png")], "leads out of"),
        ([entry("is it?", "<image>", image="0.png")], "an answer contains <image>"),
        ([entry("is it?", None)], "turn 1 is None instead of a text"),
        ([entry("is it?", "yes", image=7)], "image 7 is neither a path nor a list of paths"),
        (["is it?"], "entry 0: str instead of a conversation"),
        ([{"id": 1}], "no key conversations"),
        ([{"id": 1, "conversations": [{"value": "?"}]}], "no key from"),
        ([], "not a list of conversations, or an empty one"),
        ({"id": 1}, "not a list of conversations"),
        ([entry("what is a <reponame>?", "a dog")], "its text contains <image> or <reponame>, which stands for an"),
    ],
)
def test_bad_conversations_are_named(tmp_path, entries, message):
    folder = tmp_path / "llava_instruct"
    write_conversations(folder, entries)
    write_conversations(folder, [entry("is it?", "yes")], "validation")
    write_conversations(folder, [entry("is it?", "yes")], "test")
    with pytest.raises(DataError, match=message):
        task("llava_instruct").load_for(tiny_llava(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"question": ["?", None, "?", "?"]}, r"train\.parquet, row 1: column question holds None instead of a text"),
        ({"answer": ["yes", "no", "", "no"]}, "row 2: column answer holds ''; .* an empty one teaches nothing"),
        ({"answer": [3, 1, 0, 2]}, "row 0: column answer holds 3; answers are texts"),
        ({"answer": [["yes"], ["no"], [], ["no"]]}, r"row 2: column answer holds \[\]"),
        ({"image": [1, 2, 3, 4]}, "column image is int64; it must be a struct with the field bytes"),
        ({"image": None}, r"no column image \(it has question, answer\)"),
        ({"question": None}, r"no column question \(it has image, answer\)"),
        ({"answer": None}, r"no column answer \(it has image, question\)"),
    ],
)
def test_bad_rows_are_named(tmp_path, columns, message):
    cells = {"image": [{"bytes": png(0), "path": None}] * 4, "question": ["is it?"] * 4, "answer": ["yes"] * 4}
    kept = {name: values for name, values in (cells | columns).items() if values is not None}
    for split in ("train", "test"):
        write_rows(tmp_path / "pets" / f"{split}.parquet", kept)
    with pytest.raises(DataError, match=message):
        task().load_for(tiny_llava(tmp_path), tmp_path)


def test_empty_and_damaged_files_and_missing_splits_are_named(tmp_path):
    spec = tiny_llava(tmp_path)
    with pytest.raises(DataError, match=r"there is no folder .*pets: set paths\.data, or prepare it"):
        task().load_for(spec, tmp_path)
    path = write_questions(tmp_path / "pets")
    with pytest.raises(DataError, match="needs train and validation or test"):
        task().load_for(spec, tmp_path)
    write_rows(tmp_path / "pets" / "test.parquet", {"image": pa.array([], pa.struct({"bytes": pa.binary()}))})
    with pytest.raises(DataError, match=r"test\.parquet: no rows"):
        task().load_for(spec, tmp_path)
    (tmp_path / "pets" / "test.parquet").write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="not a readable parquet file"):
        task().load_for(spec, tmp_path)


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


def test_a_file_that_is_missing_is_an_image_that_cannot_be_decoded(tmp_path):
    folder = tmp_path / "llava_instruct"
    for split in ("train", "validation", "test"):
        write_conversations(folder, [entry("<image>\nis it?", "yes", image="9.png")], split)
    splits = task("llava_instruct").load_for(tiny_llava(tmp_path), tmp_path)
    with pytest.raises(DataError, match=r"images/9\.png: image cannot be decoded \(.*No such file"):
        splits.test.__getitems__([0])


def test_several_answers_of_people_are_kept_the_most_frequent_first(tmp_path):
    people = [{"answer": word, "answer_id": i} for i, word in enumerate(["blue", "red", "red"])]
    rows = {"image": [{"bytes": png(0), "path": None}], "question": ["what color?"], "answers": [people]}
    path = write_rows(tmp_path / "train.parquet", rows | {"answer_type": ["other"], "question_type": ["what color"]})
    (found,) = read_parquet([path], plain, Pictures())
    assert (found.turns, found.answers, found.kind) == (
        (("<image>\nwhat color?", "red"),),
        ("red", "red", "blue"),
        "other",
    )


def test_vqa_accuracy_needs_the_answers_of_several_people(pets, tmp_path):
    with pytest.raises(DataError, match=r"row \d: task\.metric=vqa_accuracy compares .* here is one"):
        task(metric="vqa_accuracy").load_for(tiny_llava(tmp_path), pets)
    for split in ("train", "test"):
        write_questions(pets / "pets", split, answer=[["red", "red", "blue"]] * 8)
    mine = task(metric="vqa_accuracy")
    mine.load_for(tiny_llava(tmp_path), pets)
    assert set(mine.metrics().compute(predictions=[[2]], references=[0])) == {"exact_match", "vqa_accuracy"}


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


def test_the_suffix_follows_every_question(pets, tmp_path):
    spec = tiny_llava(tmp_path)
    words = spec.tokenizer().convert_ids_to_tokens(task(suffix="yes no?").load_for(spec, pets).test[0]["input_ids"][0])
    assert words[-9:-5] == ["\n", "yes", " no", "?"] or words[-9:-5] == ["\n", "yes", "<|endoftext|>", "?"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "accuracy"}, r"task\.metric=accuracy must be exact_match or vqa_accuracy"),
        ({"unreadable": "ignore"}, "error or skip"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"validation_size": 1.5}, "whole number"),
        ({"max_length": 8}, "at least 32"),
        ({"split_seed": -1}, "split_seed"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        task(**options)


def test_models_that_do_not_see_and_write_are_refused(pets):
    for name in ("smollm2_135m", "efficientnet_lite0"):
        with pytest.raises(ConfigError, match="does not both see and write"):
            task().load_for(flora.models.get(name), pets)


def test_easy_vqa_comes_out_of_its_package(tmp_path, monkeypatch):
    import zipfile

    from flora.models.weights import sha256_of
    from flora.tasks import prepare as module

    def wheel(package, folder):
        assert package == "easy-vqa==1.0"
        path = folder / "easy_vqa.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for split in ("train", "test"):
                rows = [
                    ["what color is it?", "red", 3],
                    ["is it a circle?", "no", 3],
                    ["what shape is it?", "circle", 5],
                ]
                archive.writestr(f"easy_vqa/data/{split}/questions.json", json.dumps(rows))
                for number in (3, 5):
                    archive.writestr(f"easy_vqa/data/{split}/images/{number}.png", png(number))
        return path

    monkeypatch.setattr(module, "download_wheel", wheel)
    with pytest.raises(DataError, match="served another file"):
        prepare(find("easy_vqa"), tmp_path)
    assert not (tmp_path / "easy_vqa").exists()
    monkeypatch.setattr(module, "_EASY_VQA_SHA256", sha256_of(wheel("easy-vqa==1.0", tmp_path)))
    found = prepare(find("easy_vqa"), tmp_path)
    assert (found["rows"], found["classes"]) == ({"test": 3, "train": 3}, 3)
    pictures = Pictures()
    rows = read_parquet([tmp_path / "easy_vqa" / "test.parquet"], easy_vqa, pictures)
    assert [row.kind for row in rows] == ["color", "yes_no", "shape"]
    assert [row.images for row in rows] == [(0,), (0,), (1,)]


def test_llavas_json_may_lie_in_several_files(tmp_path):
    folder = tmp_path / "llava_instruct"
    write_conversations(folder, [entry("is it?", "yes")] * 3, "train_a")
    write_conversations(folder, [entry("is it?", "no")] * 3, "train_b")
    write_conversations(folder, [entry("is it?", "no")], "test")
    splits = task("llava_instruct").load_for(tiny_llava(tmp_path), tmp_path)
    assert splits.facts["counts"] == {"train": 4, "validation": 2, "test": 1}
    assert len(read_json(folder / "train_a.json", folder / "images", Pictures())) == 3


def test_an_answer_before_the_first_question_is_left_out_and_counted(tmp_path):
    late = entry("", "<image>\nis it?", "yes", "sure?", "yes", image="0.png")
    for number, one in enumerate(late["conversations"]):
        one["from"] = ("gpt", "human")[number % 2]
    folder = tmp_path / "llava_instruct"
    path = write_conversations(folder, [late, entry("is it?", "no")] * 2)
    write_conversations(folder, [entry("is it?", "no")], "test")
    first, second, *_ = read_json(path, folder / "images", Pictures())
    assert first.turns == (("<image>\nis it?", "yes"), ("sure?", "yes"))
    assert second.turns == (("is it?", "no"),)
    splits = task("llava_instruct").load_for(tiny_llava(tmp_path), tmp_path)
    assert splits.facts["warnings"] == ["train: 2 conversations begin with an answer, left out"]


@pytest.mark.data
def test_nlvr_has_its_statements(data_folder, tmp_path):
    splits = task("nlvr").load_for(tiny_llava(tmp_path), data_folder)
    assert splits.facts["counts"] == {"train": 2967, "validation": 990, "test": 981}
    assert splits.facts["majority"]["answer"] == "true"
    assert splits.facts["majority"]["test"] == pytest.approx(0.556, abs=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_no_image_is_in_what_is_held_out_and_in_the_rest(seed):
    shown = [(0, 1), (0,), (1,), (2,), (3, 2), (4,), ()]
    found = [Dialogue((("?", "yes"),), images, ("yes",), "other", "here") for images in shown]
    rest, held_out = hold_out(found, 1, seed)
    seen, kept = ({i for dialogue in part for i in dialogue.images} for part in (rest, held_out))
    assert not seen & kept
    assert len(rest) + len(held_out) == len(found)
    assert rest
    assert held_out
