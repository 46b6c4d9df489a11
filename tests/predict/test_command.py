"""``mode=predict``: what goes in, the file that comes out, and what is refused."""

import contextlib
import csv
import json
from os import fsdecode
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import flora
from flora.errors import ConfigError
from flora.files import whole_file
from flora.predict.command import _cells, _columns
from flora.predict.inputs import read
from flora.tasks.imagefolder.dataset import LazyImages
from tests.tasks.conftest import png


def table(path):
    """The rows of a CSV file, as texts."""
    with Path(path).open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def predicted(answer):
    """The rows of a file that mode=predict has named on its last line."""
    code, out, err = answer
    assert code == 0, err
    assert out.splitlines()[-1].startswith("predictions: ")
    return table(out.splitlines()[-1].removeprefix("predictions: "))


def test_a_folder_of_pictures(predict, runs):
    rows = predicted(predict("pictures", "input=data/photos/val"))
    assert Path("pictures/predictions.csv").is_file(), "where no other place is given"
    assert [row["path"] for row in rows] == sorted(str(p) for p in Path("data/photos/val").rglob("*.png"))
    assert list(rows[0]) == ["path", "prediction", "probability", "p(ant)", "p(bee)"]
    right = [row["prediction"] == Path(row["path"]).parent.name for row in rows]
    assert np.mean(right) == runs["pictures"]["value"], "the folder is the run's test split"
    for row in rows:
        assert float(row["probability"]) == float(row[f"p({row['prediction']})"])
        assert float(row["p(ant)"]) + float(row["p(bee)"]) == pytest.approx(1)
    found = flora.load("pictures", device="cpu").predict([row["path"] for row in rows])
    assert [float(row["probability"]) for row in rows] == [prediction.probability for prediction in found]


def test_batches_are_those_of_the_run_or_as_asked(predict, monkeypatch):
    sizes = []
    gather = LazyImages.__getitems__
    monkeypatch.setattr(LazyImages, "__getitems__", lambda self, rows: sizes.append(len(rows)) or gather(self, rows))
    predicted(predict("pictures", "input=data/photos/val", "trainer.eval_batch_size=5"))
    assert sizes == [5, 5, 2]


def test_one_picture_and_a_parquet_file_of_pictures_as_a_parquet_file(predict):
    (row,) = predicted(predict("pictures", "input=data/photos/val/bee/3.png"))
    cells = [{"bytes": Path(f"data/photos/val/bee/{n}.png").read_bytes(), "path": None} for n in (3, 1)]
    pq.write_table(pa.table({"image": cells}), "some.parquet")
    code, out, err = predict("pictures", "input=some.parquet", "output=new/out.parquet")
    assert code == 0, err
    assert out.splitlines()[-1] == "predictions: new/out.parquet"
    found = pq.read_table("new/out.parquet").to_pydict()
    assert found["row"] == [0, 1]
    assert found["prediction"][0] == row["prediction"]
    assert found["p(bee)"][0] == pytest.approx(float(row["p(bee)"]), abs=1e-6)
    assert found["p(bee)"][0] != found["p(bee)"][1]


def test_predictions_of_before_are_not_replaced_unless_their_file_is_named(predict):
    folder = Path("pictures")
    _, first, _ = predict("pictures", "input=data/photos/val/bee")
    before = Path(first.split("predictions: ")[1].strip()).read_text()
    _, second, _ = predict("pictures", "input=data/photos/val/bee/3.png")
    assert first.endswith("pictures/predictions.csv\n")
    assert second.endswith("pictures/predictions-2.csv\n")
    assert (folder / "predictions.csv").read_text() == before
    predict("pictures", "input=data/photos/val/bee/3.png", "output=pictures/predictions.csv")
    assert (folder / "predictions.csv").read_text() == (folder / "predictions-2.csv").read_text()


def test_an_unreadable_picture_ends_it_or_is_left_out(predict):
    Path("data/photos/val/ant/2.png").write_bytes(b"nothing")
    Path("pictures/predictions.csv").write_text("of before")
    code, out, err = predict("pictures", "input=data/photos/val")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: data/photos/val/ant/2.png: image cannot be decoded")
    assert Path("pictures/predictions.csv").read_text() == "of before"
    Path("pictures/predictions.csv").unlink()
    code, out, err = answer = predict("pictures", "input=data/photos/val", "task.unreadable=skip")
    rows = predicted(answer)
    assert "1 of 12 inputs cannot be decoded and were left out" in err
    assert [row["path"] for row in rows if "/ant/" in row["path"]] == [
        f"data/photos/val/ant/{n}.png" for n in (0, 1, 3, 4, 5)
    ]
    assert not list(Path("pictures").glob(".*"))


TEXTS = ["the cat sat", "a dog", 'no, "dog" ran\non']


def written(kind):
    """A file of TEXTS under a column that the run knows."""
    path = Path(f"texts.{kind}")
    if kind == "parquet":
        pq.write_table(pa.table({"sentence": TEXTS, "more": [1, 2, 3]}), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"more": 1, "sentence": text}) + "\n\n" for text in TEXTS))
    else:
        with path.open("w", newline="") as stream:
            lines = csv.writer(stream, delimiter="," if kind == "csv" else "\t")
            lines.writerows([("more", "sentence"), *((1, text) for text in TEXTS)])
    return path


def test_texts_of_every_kind_of_file(predict):
    expected = [p.probabilities["positive"] for p in flora.load("texts", device="cpu").predict(TEXTS)]
    assert len(set(expected)) == 3
    for kind in ("csv", "tsv", "jsonl", "parquet"):
        rows = predicted(predict("texts", f"input={written(kind)}"))
        assert [row["row"] for row in rows] == ["0", "1", "2"]
        assert [float(row["p(positive)"]) for row in rows] == expected
    Path("lines.txt").write_text("the cat sat\n\na dog\n")
    assert [float(r["p(positive)"]) for r in predicted(predict("texts", "input=lines.txt"))] == pytest.approx(
        expected[:2]
    )
    _, _, err = answer = predict("texts", "input=lines.txt")
    assert [row["row"] for row in predicted(answer)] == ["0", "2"], "the lines of the file"
    assert "lines.txt: 1 blank line is left out" in err
    Path("gap.csv").write_text("sentence\nthe cat sat\n\na dog\n")
    _, _, err = answer = predict("texts", "input=gap.csv")
    assert [row["row"] for row in predicted(answer)] == ["0", "1"], "the rows that readers of tables count"
    assert "gap.csv: 1 blank line is left out" in err
    assert "predicted 2 of 2 inputs" in err
    (row,) = predicted(predict("texts", "input=the cat sat"))
    assert float(row["p(positive)"]) == pytest.approx(expected[0])
    Path("one.csv").write_text("anything\nthe cat sat\n")
    assert predicted(predict("texts", "input=one.csv")) == [row], "a single column need not have the run's name"


def test_pairs_of_texts_and_numbers(predict):
    Path("pairs.csv").write_text("sentence2,sentence1\na dog,the cat sat\n")
    (row,) = predicted(predict("pairs", "input=pairs.csv"))
    (same,) = predicted(predict("pairs", "input=[the cat sat,a dog]"))
    assert row == same
    (number,) = predicted(predict("numbers", "input=pairs.csv"))
    expected = flora.load("numbers", device="cpu").predict(("the cat sat", "a dog")).value
    assert (list(number), float(number["prediction"])) == (["row", "prediction"], expected)


def test_questions_about_pictures(predict):
    Path("ask/asked.csv").write_text('image,question\na.png,what color is it?\nb.png,"is it red, dog?"\n')
    rows = predicted(predict("questions", "input=ask/asked.csv"))
    assert [row["path"] for row in rows] == ["ask/images/a.png", "ask/b.png"]
    assert [row["question"] for row in rows] == ["what color is it?", "is it red, dog?"]
    asked = [(row["path"], row["question"]) for row in rows]
    answers = [answer.text for answer in flora.load("questions", device="cpu").predict(asked)]
    assert [row["prediction"] for row in rows] == answers
    (row,) = predicted(predict("questions", "input=[ask/b.png,what color is it?]"))
    assert (row["path"], row["question"]) == ("ask/b.png", "what color is it?")
    assert len(predicted(predict("questions", "input=data/pets/test.parquet"))) == 8


@pytest.mark.parametrize(
    ("run", "overrides", "message"),
    [
        ("pictures", [], "mode=predict needs input="),
        ("pictures", ["input=nowhere"], "input=nowhere: there is no such file or folder"),
        ("pictures", ["input=words"], "input=words: no pictures in there"),
        ("pictures", ["input=[a,b]"], "this run takes one folder, file or text"),
        ("pictures", ["input=broken.csv"], "this run takes a picture, a folder of pictures"),
        ("pictures", ["input=data/photos", "output=out.txt"], "output=out.txt must end in .csv or .parquet"),
        ("pictures", ["input=data/photos", "output=words.csv"], "output=words.csv cannot be written (it is a folder)"),
        ("pictures", ["input=data/photos", "output=/proc/no/out.csv"], "output=/proc/no/out.csv cannot be written"),
        ("pictures", ["input=data/glue/sst2/train.parquet"], "no column image"),
        ("pictures", ["input=data/photos", "task.crop=1"], "task.crop"),
        ("texts", ["input=nowhere.csv"], "there is no such file"),
        ("texts", ["input=broken.csv"], "broken.csv, line 3: 1 cells, but the header has 2"),
        ("texts", ["input=broken.jsonl"], "broken.jsonl cannot be read (line 1 is no JSON"),
        ("texts", ["input=latin.csv"], "latin.csv, line 2, is not UTF-8"),
        ("texts", ["input=empty.csv"], "empty.csv: no rows"),
        ("texts", ["input=words"], "a table must be .csv, .tsv, .jsonl"),
        ("texts", ["input=data/pets/test.parquet"], "no column sentence (it has image, question, answer)"),
        ("texts", ["input=gap.jsonl"], "gap.jsonl, line 1: column sentence holds None instead of a text"),
        ("pairs", ["input=the cat"], "this run takes a table"),
        (
            "questions",
            ["input=ask/b.png"],
            "a table (.csv, .tsv, .jsonl, .ndjson, .json, .parquet) with image and question",
        ),
        ("questions", ["input=one.csv"], "task.question: none of the columns has a usual name"),
        ("words", ["input=data"], "no adapter_model.safetensors"),
    ],
)
def test_what_cannot_be_predicted_is_one_line_and_no_file(predict, run, overrides, message):
    Path("broken.csv").write_text("sentence,more\na,1\nb\n")
    Path("broken.jsonl").write_text("{sentence: a}\n")
    Path("latin.csv").write_bytes("sentence\nné\n".encode("latin-1"))
    Path("empty.csv").write_text("sentence\n")
    Path("gap.jsonl").write_text('{"sentence": null}\n')
    Path("one.csv").write_text("image\na.png\n")
    Path("words.csv").mkdir()
    code, out, err = predict(run, *overrides)
    assert (code, out) == (2, ""), err
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in err
    assert not list(Path().rglob("predictions.csv"))


@pytest.mark.parametrize(
    "overrides", [["mode=train", "input=data"], ["mode=eval", "checkpoint=pictures", "output=a.csv"]]
)
def test_inputs_are_for_predictions(predict, overrides):
    code, _, err = predict("pictures", *overrides)
    assert code == 2
    assert "is for mode=predict" in err.splitlines()[-1] or "is for mode=eval" in err.splitlines()[-1]


class Many:
    """A predictor of thirty classes."""

    num_classes = 30
    class_names = [f"c{n}" for n in range(30)]


def test_of_many_classes_the_five_likeliest_are_named():
    logits = np.zeros((2, 30), np.float32)
    logits[0, [3, 9, 4, 7, 8]] = 9, 8, 7, 6, 5
    cells = _cells(Many(), logits)
    assert list(cells) == _columns(Many())
    assert [cells["prediction"][0], *(cells[f"class {n}"][0] for n in range(2, 6))] == ["c3", "c9", "c4", "c7", "c8"]
    shares = [cells["probability"][0], *(cells[f"p {n}"][0] for n in range(2, 6))]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == pytest.approx(np.exp(9) / np.exp(logits[0].astype(float)).sum())
    assert cells["prediction"][1] == "c0"


def test_a_long_text_is_no_path(tmp_path):
    text = "the cat sat " * 400
    assert read(text, "sequence_classification", ["sentence"]).values == [text]


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "out.csv"
    path.write_text("before")
    with contextlib.suppress(RuntimeError), whole_file(path) as place:
        place.write_text("half")
        raise RuntimeError
    assert path.read_text() == "before"
    with whole_file(path) as place:
        place.write_text("whole")
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_names_of_files_that_are_no_utf8_are_shown(tmp_path):
    place = tmp_path / fsdecode(b"caf\xe9.png")
    Image.new("RGB", (4, 4)).save(place, "PNG")
    (tmp_path / "z.png").write_bytes(png(1))
    inputs = read(str(tmp_path), "image", ())
    assert [name.encode() for name in inputs.columns["path"]]
    with pytest.raises(ConfigError):
        read([1, 2], "image_text", ())
