"""Files of questions and conversations: what they say, and what is wrong with them."""

import json

import pytest

from flora.errors import DataError
from flora.tasks.prepare.folder import prepare
from flora.tasks.prepare.items import find
from flora.tasks.vqa.dialogues import Pictures, easy_vqa, plain, read_json, read_parquet
from tests.tasks.chats import tiny_llava
from tests.tasks.conftest import png
from tests.tasks.texts import write_rows
from tests.tasks.vqa.questions import conversation, task, write_conversations


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([conversation("is it?")], r"entry 0 \(id 7\): turns must be human, gpt, human, gpt, .*here they are human;"),
        ([{"conversations": [{"from": "gpt", "value": "yes"}, {"from": "human", "value": "?"}]}], "are gpt, human"),
        ([{"conversations": [{"from": "gpt", "value": "yes"}]}], "here they are gpt;"),
        ([conversation("is it?", "yes"), conversation("is it?", " ")], "entry 1 .*turn 1 is ' ' instead of a text"),
        ([conversation("<image>\nis it?", "yes")], "<image> occurs 1 times, but there are 0 images"),
        ([conversation("is it?", "yes", image="0.png")], "<image> occurs 0 times, but there are 1 images"),
        ([conversation("<image>\nis it?", "yes", image="../secret.png")], "leads out of"),
        ([conversation("is it?", "<image>", image="0.png")], "an answer contains <image>"),
        ([conversation("is it?", None)], "turn 1 is None instead of a text"),
        ([conversation("is it?", "yes", image=7)], "image 7 is neither a path nor a list of paths"),
        (["is it?"], "entry 0: str instead of a conversation"),
        ([{"id": 1}], "no key conversations"),
        ([{"id": 1, "conversations": [{"value": "?"}]}], "no key from"),
        ([], "not a list of conversations, or an empty one"),
        ({"id": 1}, "not a list of conversations"),
        (
            [conversation("what is a <reponame>?", "a dog")],
            "its text contains <image> or <reponame>, which stands for an",
        ),
    ],
)
def test_bad_conversations_are_named(tmp_path, entries, message):
    folder = tmp_path / "llava_instruct"
    write_conversations(folder, entries)
    write_conversations(folder, [conversation("is it?", "yes")], "validation")
    write_conversations(folder, [conversation("is it?", "yes")], "test")
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


def test_several_answers_of_people_are_kept_the_most_frequent_first(tmp_path):
    people = [{"answer": word, "answer_id": i} for i, word in enumerate(["blue", "red", "red"])]
    rows = {"image": [{"bytes": png(0), "path": None}], "question": ["what color?"], "answers": [people]}
    path = write_rows(tmp_path / "train.parquet", rows | {"answer_type": ["other"], "question_type": ["what color"]})
    (dialogue,) = read_parquet([path], plain, Pictures())
    assert (dialogue.turns, dialogue.answers, dialogue.kind) == (
        (("<image>\nwhat color?", "red"),),
        ("red", "red", "blue"),
        "other",
    )


def test_llavas_json_may_lie_in_several_files(tmp_path):
    folder = tmp_path / "llava_instruct"
    write_conversations(folder, [conversation("is it?", "yes")] * 3, "train_a")
    write_conversations(folder, [conversation("is it?", "no")] * 3, "train_b")
    write_conversations(folder, [conversation("is it?", "no")], "test")
    splits = task("llava_instruct").load_for(tiny_llava(tmp_path), tmp_path)
    assert splits.facts["counts"] == {"train": 4, "validation": 2, "test": 1}
    assert len(read_json(folder / "train_a.json", folder / "images", Pictures())) == 3


def test_an_answer_before_the_first_question_is_left_out_and_counted(tmp_path):
    late = conversation("", "<image>\nis it?", "yes", "sure?", "yes", image="0.png")
    for number, turn in enumerate(late["conversations"]):
        turn["from"] = ("gpt", "human")[number % 2]
    folder = tmp_path / "llava_instruct"
    path = write_conversations(folder, [late, conversation("is it?", "no")] * 2)
    write_conversations(folder, [conversation("is it?", "no")], "test")
    first, second, *_ = read_json(path, folder / "images", Pictures())
    assert first.turns == (("<image>\nis it?", "yes"), ("sure?", "yes"))
    assert second.turns == (("is it?", "no"),)
    splits = task("llava_instruct").load_for(tiny_llava(tmp_path), tmp_path)
    assert splits.facts["warnings"] == ["train: 2 conversations begin with an answer, left out"]


def test_easy_vqa_comes_out_of_its_package(tmp_path, monkeypatch):
    import zipfile

    from flora.models.weights import sha256_of
    from flora.tasks.prepare import easy_vqa as package

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

    monkeypatch.setattr(package, "download_wheel", wheel)
    with pytest.raises(DataError, match="served another file"):
        prepare(find("easy_vqa"), tmp_path)
    assert not (tmp_path / "easy_vqa").exists()
    monkeypatch.setattr(package, "SHA256", sha256_of(wheel("easy-vqa==1.0", tmp_path)))
    content = prepare(find("easy_vqa"), tmp_path)
    assert (content["rows"], content["classes"]) == ({"test": 3, "train": 3}, 3)
    pictures = Pictures()
    rows = read_parquet([tmp_path / "easy_vqa" / "test.parquet"], easy_vqa, pictures)
    assert [row.kind for row in rows] == ["color", "yes_no", "shape"]
    assert [row.images for row in rows] == [(0,), (0,), (1,)]


def test_the_suffix_follows_every_question(pets, tmp_path):
    spec = tiny_llava(tmp_path)
    words = spec.tokenizer().convert_ids_to_tokens(task(suffix="yes no?").load_for(spec, pets).test[0]["input_ids"][0])
    assert words[-9:-5] == ["\n", "yes", " no", "?"] or words[-9:-5] == ["\n", "yes", "<|endoftext|>", "?"]


@pytest.mark.data
def test_nlvr_has_its_statements(data_folder, tmp_path):
    splits = task("nlvr").load_for(tiny_llava(tmp_path), data_folder)
    assert splits.facts["counts"] == {"train": 2967, "validation": 990, "test": 981 - 27}
    assert splits.facts["left_out"] == {"test": 27, "why": "their images are in train or validation"}
