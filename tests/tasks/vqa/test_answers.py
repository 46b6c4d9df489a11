"""Scores of written answers, against numbers worked out by hand."""

import numpy as np
import pytest

from flora.tasks.vqa.answers import Written, normalised, says_yes, scores, vqa_accuracy
from flora.tasks.vqa.dialogues import Dialogue


def asked(*answers, kind="other"):
    return Dialogue((("q", answers[0]),), (), answers, kind, "here")


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("The Red car.", "red car"),
        ("two", "2"),
        ("none", "0"),
        ("it isnt a dog", "it isn't dog"),
        ("couldntve", "couldn't've"),
        ("shed", "shed"),
        ("black/white", "black white"),
        ("T-shirt!", "t shirt"),
        ("at 5:30", "at 5:30"),
        ("{ball}", "ball"),
        ("it's a dog", "it's dog"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("yes, it is", "yes it is"),
        (" a\n b ", "b"),
    ],
)
def test_answers_are_brought_to_one_form(text, same):
    assert normalised(text) == same


@pytest.mark.parametrize(
    ("agree", "accuracy"),
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_is_the_mean_over_nine_of_ten_people(agree, accuracy):
    """One of ten agrees: nine subsets hold them (1/3 each), one does not. Two: eight give 2/3, two 1/3. And so on."""
    answers = ["red"] * agree + [f"other {i}" for i in range(10 - agree)]
    assert vqa_accuracy("Red.", answers) == pytest.approx(accuracy)


def test_people_keep_their_punctuation_where_all_agree():
    assert vqa_accuracy("t-shirt", ["t-shirt"] * 10) == 0  # as the official evaluation has it
    assert vqa_accuracy("t-shirt", ["t-shirt"] * 9 + ["shirt"]) == 1
    assert vqa_accuracy("black white", ["black/white"] * 9 + ["white"]) == 1


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True),
        ("yes, there is no doubt", False),
        ("No, it is not.", False),
        ("A dog. No cat.", True),
        ("there is not", False),
        ("False", False),
        ("true", True),
        ("", True),
    ],
)
def test_yes_and_no_are_read_as_pope_reads_them(text, yes):
    assert says_yes(text) == yes


def test_yes_no_f1_counts_yes_as_positive():
    dialogues = [asked("yes"), asked("yes"), asked("yes"), asked("no"), asked("no"), asked("blue")]
    values = scores(["yes", "Yes, it is", "no", "yes", "No.", "blue"], dialogues)
    assert values["yes_no_precision"] == pytest.approx(2 / 3)
    assert values["yes_no_recall"] == pytest.approx(2 / 3)
    assert values["yes_no_f1"] == pytest.approx(2 / 3)
    assert values["yes_no_accuracy"] == pytest.approx(3 / 5)
    assert values["yes_share"] == pytest.approx(3 / 5)
    assert values["exact_match"] == pytest.approx(3 / 6)
    assert "vqa_accuracy" not in values


def test_without_yes_or_no_there_is_no_f1_and_kinds_are_apart():
    dialogues = [asked("red", kind="color"), asked("blue", kind="color"), asked("circle", kind="shape")]
    values = scores(["red", "red", "circle"], dialogues)
    assert values == {
        "exact_match": pytest.approx(2 / 3),
        "exact_match_color": 0.5,
        "exact_match_shape": 1.0,
    }
    several = scores(["red"], [asked(*["red"] * 3, *["blue"] * 7)])
    assert several["vqa_accuracy"] == pytest.approx(0.9)


def test_the_metric_reads_tokens_and_remembers_what_was_written():
    words = {5: "yes", 6: "no"}
    metric = Written([asked("yes"), asked("no")], lambda row: " ".join(words[t] for t in row if t in words))
    values = metric.compute(predictions=np.array([[6, 2, -100], [6, 6, 2]]), references=np.array([1, 0]))
    assert metric.texts == {1: "no", 0: "no no"}
    assert values["exact_match"] == 0.5
    assert metric.greater_is_better
