"""POPE, ScienceQA-IMG, GQA and TextVQA by their public file formats, against scores worked out by hand."""

import json

import pytest

from flora.errors import ConfigError, DataError
from flora.tasks.vqa.answers import textvqa_accuracy
from flora.tasks.vqa.benchmarks import BENCHMARKS, letter_of
from flora.tasks.vqa.dialogues import Pictures
from tests.tasks.chats import tiny_llava
from tests.tasks.conftest import png
from tests.tasks.vqa.questions import task

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(0))


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pope(folder):
    labels = {"random": ["yes", "no"], "popular": ["yes", "no"], "adversarial": ["yes", "no", "no"]}
    for category, said in labels.items():
        rows = [
            {"question_id": n, "image": "COCO_val2014_1.jpg", "text": "Is there a dog in the image?", "label": label}
            for n, label in enumerate(said, 1)
        ]
        lines(folder / f"coco_pope_{category}.json", rows)
    picture(folder / "val2014" / "COCO_val2014_1.jpg")


def scienceqa(folder):
    problem = {"question": "Which is red?", "choices": ["a dog", "it"], "answer": 1, "hint": "", "image": "image.png"}
    problem |= {"split": "test", "subject": "natural science", "lecture": "", "solution": ""}
    problems = {
        "1": problem,
        "2": problem | {"image": None},
        "3": problem
        | {"hint": "It is red.", "choices": ["no", "yes", "blue"], "answer": 0, "subject": "social science"},
        "4": problem | {"split": "train"},
    }
    folder.mkdir(parents=True)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"train": ["4"], "test": ["1", "2", "3"]}))
    for name in ("1", "3"):
        picture(folder / "images" / "test" / name / "image.png")


def gqa(folder):
    row = {"question": "What color is it?", "answer": "red", "imageId": "n1", "types": {"structural": "query"}}
    folder.mkdir(parents=True)
    questions = {"201": row, "202": row | {"answer": "yes", "types": {"structural": "verify"}}}
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(questions))
    picture(folder / "images" / "n1.jpg")


def textvqa(folder):
    row = {"question": "what is it?", "question_id": 34602, "image_id": "abc", "answers": ["blue"] * 2 + ["Red"] * 8}
    folder.mkdir(parents=True)
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"dataset_type": "val", "data": [row]}))
    picture(folder / "train_images" / "abc.jpg")


WRITERS = {"pope": pope, "scienceqa": scienceqa, "gqa": gqa, "textvqa": textvqa}


def asked(name, tmp_path):
    folder = tmp_path / name
    if not folder.exists():
        WRITERS[name](folder)
    return BENCHMARKS[name].dialogues(folder, folder, Pictures())


def words(dialogue):
    return dialogue.turns[0][0].removeprefix("<image>\n")


def test_questions_are_asked_as_llava_asks_them(tmp_path):
    assert words(asked("pope", tmp_path)[0]) == f"Is there a dog in the image?\n{SHORT}"
    assert words(asked("gqa", tmp_path)[0]) == f"What color is it?\n{SHORT}"
    assert words(asked("textvqa", tmp_path)[0]) == f"what is it?\n{SHORT}"
    first, last = asked("scienceqa", tmp_path)  # of the test, those with an image
    assert words(first) == f"Which is red?\nA. a dog\nB. it\n{LETTER}"
    assert words(last) == f"Context: It is red.\nWhich is red?\nA. no\nB. yes\nC. blue\n{LETTER}"
    assert (first.answers, last.answers) == (("B",), ("A",))


def test_textvqa_takes_the_words_that_llava_lists_where_its_questions_are_there(tmp_path):
    textvqa(tmp_path / "textvqa")
    text = f"What is it?\nReference OCR token: NO, DOG\n{SHORT}"
    lines(
        tmp_path / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl",
        [{"question_id": "abc", "image": "abc.jpg", "text": text}],
    )
    assert words(asked("textvqa", tmp_path)[0]) == text


def test_pope_is_the_mean_f1_of_three_categories(tmp_path):
    dialogues = asked("pope", tmp_path)
    written = ["Yes", "No.", "Yes", "Yes", "yes", "yes", "no"]
    values = BENCHMARKS["pope"].score(written, dialogues)
    # random: all right; popular: one hit, one false yes; adversarial: a hit, a false yes, a right no
    each = {"random": (1, 1, 1 / 2), "popular": (2 / 3, 1 / 2, 1), "adversarial": (2 / 3, 2 / 3, 2 / 3)}
    for category, (f1, accuracy, share) in each.items():
        named = [values[f"{category}_{name}"] for name in ("f1", "accuracy", "yes_share")]
        assert named == pytest.approx([f1, accuracy, share])
    assert values["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert values["accuracy"] == pytest.approx((1 + 1 / 2 + 2 / 3) / 3)


@pytest.mark.parametrize(
    ("text", "letter"),
    [("B", "B"), ("B. it", "B"), ("The answer is B.", "B"), (" B ", "B"), ("it", None), ("Both", None), ("", None)],
)
def test_a_letter_is_read_as_llava_reads_it(text, letter):
    assert letter_of(text) == letter


def test_choices_and_short_answers_are_right_or_wrong(tmp_path):
    assert BENCHMARKS["scienceqa"].score(["B. it", "C"], asked("scienceqa", tmp_path)) == {
        "accuracy": 0.5,
        "natural_science_accuracy": 1.0,
        "social_science_accuracy": 0.0,
    }
    values = BENCHMARKS["gqa"].score(["Red.", "yes it is"], asked("gqa", tmp_path))
    assert values == {"accuracy": 0.5, "query_accuracy": 1.0, "verify_accuracy": 0.0}
    assert BENCHMARKS["textvqa"].score(["the red"], asked("textvqa", tmp_path)) == {"vqa_accuracy": 1.0}


@pytest.mark.parametrize(
    ("text", "answers", "accuracy"),
    [
        ("Blue", ["blue"] * 2 + ["red"] * 8, 0.6),  # eight of ten leave out another: 2/3, two leave out one: 1/3
        ("two", ["2"] * 10, 1.0),
        ("U.S.A", ["usa"] * 3 + ["uk"] * 7, 0.9),  # seven times 3/3, three times 2/3
        ("macy's", ["Macy's"] * 10, 1.0),
        ("1,000?", ["1000"] * 10, 1.0),
        ("t-shirt", ["t shirt"] * 10, 1.0),
        ("", ["answering does not require reading text in the image"] * 10, 0.0),
    ],
)
def test_textvqa_accuracy_brings_both_sides_to_one_form(text, answers, accuracy):
    assert textvqa_accuracy(text, answers) == pytest.approx(accuracy)


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_a_benchmark_is_a_test_alone_with_a_metric_of_its_own(name, tmp_path):
    WRITERS[name](tmp_path / name)
    mine = task(name, metric="exact_match", split=[98, 1, 1])  # as the run that is tested has them
    splits = mine.load_for(tiny_llava(tmp_path), tmp_path)
    assert (len(splits.train), len(splits.validation)) == (0, 0)
    assert mine.metric == BENCHMARKS[name].metric
    assert splits.facts["split_rule"] == "a test alone"
    assert splits.test.__getitems__([0])["pixel_values"].shape == (1, 3, 64, 64)
    sums = mine.contents(tmp_path)
    (tmp_path / name / "unasked.jpg").write_bytes(png(1))
    assert mine.contents(tmp_path) == sums, "an image that no question is about does not count"
    next(p for p in (tmp_path / name).rglob("*.[jp][pn]g") if p.name != "unasked.jpg").write_bytes(png(2))
    assert mine.contents(tmp_path) != sums
    with pytest.raises(ConfigError, match=r"task\.metric=f1 must be"):
        task(name, metric="f1")


def test_files_that_are_missing_or_of_something_else_are_named(tmp_path):
    pope(tmp_path / "pope")
    (tmp_path / "pope" / "coco_pope_popular.json").write_text("[")
    with pytest.raises(DataError, match=r"pope cannot be read .*popular\.json, line 1"):
        asked("pope", tmp_path)
    (tmp_path / "pope" / "coco_pope_popular.json").unlink()
    with pytest.raises(DataError, match=r"lacks coco_pope_popular\.json: docs/vqa\.md"):
        task("pope").load_for(tiny_llava(tmp_path), tmp_path)
    (tmp_path / "gqa").mkdir()
    (tmp_path / "gqa" / "testdev_balanced_questions.json").write_text('{"1": {"question": "what?"}}')
    with pytest.raises(DataError, match="a question has no imageId"):
        asked("gqa", tmp_path)
    textvqa(tmp_path / "textvqa")
    rows = {"data": [{"question": "what?", "question_id": 1, "image_id": "abc", "answers": ["red"]}]}
    (tmp_path / "textvqa" / "TextVQA_0.5.1_val.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match="question 1 has 1 answers instead of ten"):
        asked("textvqa", tmp_path)
