"""What a column of labels means."""

from tests.tasks.text.test_own import load


def test_codes_are_words_and_splits_agree_on_classes(tmp_path):
    for split, codes in (("train", ["01", "1", "x"]), ("test", ["01", "1", "01"])):
        lines = "".join(f"text {number},{codes[number % 3]}\n" for number in range(60))
        (tmp_path / f"{split}.csv").write_text(f"text,label\n{lines}")
    splits = load(tmp_path)
    assert splits.class_names == ["01", "1", "x"]
    assert set(splits.test.values["labels"].tolist()) == {0, 1}


def test_whole_numbers_of_many_values_may_be_amounts(tmp_path, capsys):
    (tmp_path / "prices.csv").write_text("text,label\n" + "".join(f"text {n},{n % 30}\n" for n in range(120)))
    load(tmp_path, "prices.csv")
    said = "each of 30 whole numbers is a class of its own; where they are amounts to predict, set task.kind=regression"
    assert said in capsys.readouterr().err
    load(tmp_path, "prices.csv", kind="classification")
    assert "task.kind=regression" not in capsys.readouterr().err
