"""Own questions: tables that name an image file, several answers, what is missing, what leads out of the folder."""

import json
from pathlib import Path

import pandas
import pytest

from flora.errors import ConfigError, DataError
from flora.tasks.vqa.answers import scores
from flora.tasks.vqa.dialogues import Dialogue
from tests.tasks.chats import tiny_llava
from tests.tasks.conftest import png
from tests.tasks.vqa.questions import task

ROWS = [
    {"image_name": f"scans/{i % 10}.png", "question": "what color is it?", "answer": ("red", "yes")[i % 2]}
    for i in range(40)
]


def write(folder, name, rows=ROWS, images="images"):
    """A table, and the ten images that it names; the path."""
    (folder / images / "scans").mkdir(parents=True, exist_ok=True)
    for number in range(10):
        (folder / images / "scans" / f"{number}.png").write_bytes(png(number))
    path, frame = folder / name, pandas.DataFrame(rows)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=path.suffix == ".jsonl")
    return path


def load(tmp_path, dataset="scans", **options):
    mine = task(dataset, **options)
    return mine, mine.load_for(tiny_llava(tmp_path), tmp_path)


@pytest.mark.parametrize("name", ["own.csv", "own.jsonl", "own.json", "own.parquet"])
def test_every_format_gives_the_same_questions_drawn_by_image(tmp_path, name, capsys):
    write(tmp_path / "scans", name)
    mine, splits = load(tmp_path)
    assert splits.facts["counts"] == {"train": 24, "validation": 8, "test": 8}
    assert splits.facts["split_rule"] == "drawn 70/15/15 % train/validation/test, seed 0, by image"
    assert {split: len(names) for split, names in splits.drawn.items()} == splits.facts["counts"]
    assert "scans has no validation and no test: drawn 70/15/15 %" in capsys.readouterr().err
    shown = [
        {image for images in getattr(splits, split).images for image in images} for split in splits.facts["counts"]
    ]
    assert sum(map(len, shown)) == len(set().union(*shown)) == 10, "no image is in two splits"
    asked = mine._asked[-1]
    assert asked.turns[0][0] == "<image>\nwhat color is it?"
    assert asked.answers in (("red",), ("yes",))
    assert splits.test.__getitems__([0])["pixel_values"].shape[0] == 1
    assert mine.files(tmp_path) == (tmp_path / "scans", [tmp_path / "scans" / name])
    assert splits.facts["files"]["images"]["sha256"]


def test_files_are_splits_and_columns_and_the_folder_are_named(tmp_path):
    rows = [{"scan": row["image_name"], "q": row["question"], "gold": i} for i, row in enumerate(ROWS)]
    for split in ("train", "validate", "test"):
        write(tmp_path / "scans", f"{split}.csv", rows[: 20 if split == "train" else 6], images="pictures")
    named = {"image": "scan", "question": "q", "answer": "gold"}
    mine, splits = load(tmp_path, images="pictures", suffix="One word.", **named)
    assert splits.facts["counts"] == {"train": 20, "validation": 6, "test": 6}
    assert mine._asked[0].turns[0] == ("<image>\nwhat color is it?\nOne word.", "0")
    elsewhere = write(tmp_path / "other", "own.csv").parent / "images"
    assert len(load(tmp_path, images=str(elsewhere), **named)[1].test) == 6, "any folder that is named"
    with pytest.raises(DataError, match=r"there is no folder .*scans/pics: correct task\.images=pics"):
        load(tmp_path, images="pics", **named)
    with pytest.raises(ConfigError, match=r"task\.question=Q is no column; .*there are scan, q, gold"):
        load(tmp_path, images="pictures", **named | {"question": "Q"})
    with pytest.raises(ConfigError, match=r"task\.split=\[1, 1, 1\]: there is train and validation and test already"):
        load(tmp_path, images="pictures", split=[1, 1, 1], **named)


def test_several_answers_are_a_list_and_any_of_them_counts(tmp_path):
    accepted = [["red", "crimson"], ["yes"], ["2", "two", "a pair"]]
    for name, rows in {
        "train.jsonl": [row | {"answers": accepted[i % 3]} for i, row in enumerate(ROWS)],
        "test.csv": [row | {"answers": json.dumps(accepted[i % 3])} for i, row in enumerate(ROWS)],
    }.items():
        write(tmp_path / "scans", name, [{k: v for k, v in row.items() if k != "answer"} for row in rows])
    mine, splits = load(tmp_path, metric="any_match", validation_size=4)
    assert [mine._asked[len(splits.validation) + i].answers for i in range(3)] == [tuple(a) for a in accepted]
    asked = [Dialogue((("?", a[0]),), (), tuple(a), "other", "") for a in accepted]
    said = scores(["Crimson.", "no", "a pair"], asked)
    assert said["any_match"] == pytest.approx(2 / 3)
    assert said["exact_match"] == 0.0
    write(tmp_path / "one", "own.csv")
    with pytest.raises(DataError, match=r"task\.metric=any_match is for lists of accepted answers"):
        load(tmp_path, "one", metric="any_match")


def test_missing_images_are_counted_or_left_out(tmp_path, capsys):
    write(tmp_path / "scans", "own.csv")
    for number in (3, 7):
        (tmp_path / "scans" / "images" / "scans" / f"{number}.png").unlink()
    with pytest.raises(
        DataError, match=r"scans/3\.png and 1 more of 10 images are missing in .*images: correct task\.images"
    ):
        load(tmp_path)
    for number in (0, 1, 9):
        (tmp_path / "scans" / "images" / "scans" / f"{number}.png").unlink()
    _, splits = load(tmp_path, unreadable="skip")
    assert "and 4 more of 10 images are missing" in capsys.readouterr().err
    names, train = splits.train.pictures.names, splits.train
    there = sum(Path(names[image]).is_file() for (image,) in train.images)
    assert len(train.__getitems__(range(24))["labels"]) == there < 24


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_name": "../secret.png"}, r"own\.csv, line 5: its image \.\./secret\.png leads out of .*images; mend"),
        ({"image_name": "/etc/passwd"}, r"line 5: its image /etc/passwd leads out of"),
        ({"image_name": None}, "line 5: column image_name is empty; mend the file"),
        ({"question": " "}, "line 5: column question is empty"),
        ({"answer": None}, "line 5: column answer is empty"),
        ({"answer": '["red", ""]'}, "line 5: column answer holds .*an empty one teaches nothing"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, said):
    write(tmp_path / "scans", "own.csv", [row | (change if i == 3 else {}) for i, row in enumerate(ROWS)])
    with pytest.raises(DataError, match=said):
        load(tmp_path)
