"""Instruction tuning: the loss and answers of a model that sees, how they are scored, bad settings and folders."""

import pyarrow as pa
import pytest
import torch
from PIL import Image

import flora.models
from flora.errors import ConfigError, DataError
from tests.tasks.chats import tiny_llava
from tests.tasks.texts import write_rows
from tests.tasks.vqa.questions import task, write_questions

IMAGE, NOT = 4, -100
SYSTEM = ["<|im_start|>", "system", "\n", "<|im_end|>", "\n"]
ASSISTANT = ["<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]


def test_a_question_to_be_answered_ends_where_the_answer_begins(pets, tmp_path):
    spec = tiny_llava(tmp_path)
    splits = task().load_for(spec, pets)
    batch = splits.test.__getitems__([1])
    words = spec.tokenizer().convert_ids_to_tokens(batch["input_ids"][0].tolist())
    assert words[-5:] == ASSISTANT
    assert "red" not in words
    assert batch["labels"].tolist() == [len(splits.validation) + 1]


def test_the_training_loss_is_that_of_transformers(pets, tmp_path):
    spec, mine = tiny_llava(tmp_path), task()
    train = mine.load_for(spec, pets).train
    torch.manual_seed(0)
    model = spec.build(0).eval()
    batch = train.__getitems__(range(4))
    kept = batch["labels"].clone()
    loss = mine.loss(*mine.forward(spec)(model, batch, True), 0.0)
    assert torch.equal(batch["labels"], kept), "the batch stays as it is"
    total, tokens = 0.0, 0
    for index in range(4):  # example by example, without padding, under transformers' own loss
        example = train[index]
        images = spec.normalize(example["pixel_values"])
        with torch.no_grad():
            expected = model(input_ids=example["input_ids"], pixel_values=images, labels=example["labels"]).loss
        count = int((example["labels"] != NOT).sum())
        total, tokens = total + float(expected) * count, tokens + count
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
    written, asked = mine.forward(spec)(model, test.__getitems__([0, 1, 2]), False)
    assert asked.tolist() == [2, 3, 4], "the first two questions are of the validation split"
    for row, index in zip(written.tolist(), range(3), strict=True):
        example = test[index]
        ids, images = example["input_ids"], spec.normalize(example["pixel_values"])
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
        assert sheet.width > 1.5 * sheet.height  # two frames
    assert splits.facts["unreadable"] == {"policy": "error", "skipped": 0, "first": []}


def test_empty_and_damaged_files_and_missing_splits_are_named(tmp_path):
    spec = tiny_llava(tmp_path)
    with pytest.raises(DataError, match=r"there is no folder .*pets: set paths\.data, or prepare it"):
        task().load_for(spec, tmp_path)
    path = write_questions(tmp_path / "pets")
    path.rename(tmp_path / "pets" / "test.parquet")
    with pytest.raises(DataError, match=r"needs train, and may have validation and test, .*; it has test\.parquet"):
        task().load_for(spec, tmp_path)
    path = write_questions(tmp_path / "pets")
    write_rows(tmp_path / "pets" / "test.parquet", {"image": pa.array([], pa.struct({"bytes": pa.binary()}))})
    with pytest.raises(DataError, match=r"test\.parquet: no rows"):
        task().load_for(spec, tmp_path)
    (tmp_path / "pets" / "test.parquet").write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="not a readable parquet file"):
        task().load_for(spec, tmp_path)


def test_vqa_accuracy_needs_the_answers_of_several_people(pets, tmp_path):
    with pytest.raises(DataError, match=r"row \d: task\.metric=vqa_accuracy compares .* here is one"):
        task(metric="vqa_accuracy").load_for(tiny_llava(tmp_path), pets)
    for split in ("train", "test"):
        write_questions(pets / "pets", split, answer=[["red", "red", "blue"]] * 8)
    mine = task(metric="vqa_accuracy")
    mine.load_for(tiny_llava(tmp_path), pets)
    assert set(mine.metrics().compute(predictions=[[2]], references=[0])) == {
        "exact_match",
        "vqa_accuracy",
        "any_match",
    }


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
