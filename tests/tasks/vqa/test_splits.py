"""What is held out shares no image with the rest; what is right without looking."""

import pytest

from flora.errors import DataError
from flora.tasks.vqa.answers import scores
from flora.tasks.vqa.dialogues import Dialogue
from flora.tasks.vqa.splits import hold_out, majority
from tests.tasks.chats import tiny_llava
from tests.tasks.vqa.questions import task, write_questions


def test_held_out_questions_share_no_image_with_those_of_training(tmp_path):
    write_questions(tmp_path / "pets", rows=40, images=10, answer=["red", "yes", "red", "red"] * 10)
    write_questions(tmp_path / "pets", "test")
    splits = task(validation_size=6).load_for(tiny_llava(tmp_path), tmp_path)
    shown = [{i for images in part.images for i in images} for part in (splits.train, splits.validation)]
    assert not shown[0] & shown[1]
    assert len(splits.validation) == 8, "two images, four questions each"
    assert splits.facts["counts"] == {"train": 32, "validation": 8, "test": 8}
    with pytest.raises(DataError, match="40 conversations to train on, 40 to hold out"):
        task(validation_size=40).load_for(tiny_llava(tmp_path), tmp_path)


def test_what_is_right_without_looking_is_told():
    def asked(question, answer):
        return Dialogue(((question, answer),), (0,), (answer,), "other", "here")

    train = [asked(q, a) for q, a in ["ay", "ay", "an", "bn", "bn", "bn", "cy"]]
    test = [asked(q, a) for q, a in ["ay", "bn", "bn", "cn", "zn", "zy"]]

    def told(train, test):
        return majority(train, test, lambda texts, asked: scores(texts, asked)["exact_match"])

    assert told(train, test) == {"answer": "n", "test": 4 / 6, "questions": 6, "by_question": 4 / 6}
    assert told(train, test[:3]) == {"answer": "n", "test": 2 / 3, "questions": 3, "by_question": 1.0}
    assert told([], test[:3]) == {"answer": "n", "test": 2 / 3, "questions": 3, "of": "test"}


def test_what_is_right_without_looking_is_asked_what_the_model_was_asked(tmp_path):
    write_questions(tmp_path / "pets", rows=16, answer=["red", "red", "red", "yes"] * 4)
    write_questions(tmp_path / "pets", "test", rows=8, answer=["yes", "red", "blue", "Red."] * 2)
    spec, mine = tiny_llava(tmp_path), task()
    splits = mine.load_for(spec, tmp_path)
    some = splits.test.subset(3)  # as trainer.max_eval_examples=3 draws them
    asked = [int(some[i]["labels"]) for i in range(3)]
    metric = mine.metrics()
    metric.compute(predictions=[[2]] * 3, references=asked)
    mine.report(metric, splits, tmp_path)
    given = [["yes", "red", "blue", "Red."][(i - len(splits.validation)) % 4] for i in asked]
    share = sum(answer in ("red", "Red.") for answer in given) / 3
    assert share != 0.5, "that of all eight"
    expected = {"answer": "red", "test": pytest.approx(share), "questions": 3, "by_question": pytest.approx(share)}
    assert splits.facts["majority"] == expected


@pytest.mark.parametrize("seed", range(6))
def test_no_image_is_in_what_is_held_out_and_in_the_rest(seed):
    shown = [(0, 1), (0,), (1,), (2,), (3, 2), (4,), ()]
    dialogues = [Dialogue((("?", "yes"),), images, ("yes",), "other", "here") for images in shown]
    rest, held_out = hold_out(dialogues, 1, seed)
    seen, kept = ({i for dialogue in part for i in dialogue.images} for part in (rest, held_out))
    assert not seen & kept
    assert len(rest) + len(held_out) == len(dialogues)
    assert rest
    assert held_out
