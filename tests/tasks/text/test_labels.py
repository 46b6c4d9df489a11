"""What a column of labels means, and what a test gives without a model."""

import numpy as np
import pytest
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.metrics import accuracy_score, mean_absolute_error, mean_squared_error

from flora.errors import DataError
from flora.tasks import baselines
from flora.tasks.metrics import Numbers, TextClasses
from tests.tasks.text.test_own import load, task, word_tokenizer


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


def test_numbers_with_a_decimal_comma_are_said_to_be_none(tmp_path, capsys):
    lines = "".join(f"text {n};{n % 4},5\n" for n in range(60))
    (tmp_path / "excel.csv").write_text(f"text;label\n{lines}")
    assert load(tmp_path, "excel.csv").class_names == ["0,5", "1,5", "2,5", "3,5"]
    assert "its labels look like numbers with separators (0,5): write them as 1234.5" in capsys.readouterr().err


def test_classes_that_differ_in_the_case_of_letters_alone_are_warned_of(tmp_path, capsys):
    labels = ("yes", "no", "Yes")
    lines = "".join(f"text {n},{labels[n % 3]}\n" for n in range(60))
    (tmp_path / "answers.csv").write_text(f"text,label\n{lines}")
    splits = load(tmp_path, "answers.csv")
    assert splits.class_names == ["Yes", "no", "yes"]
    assert "'Yes' and 'yes' are classes of their own: write them alike where they mean" in capsys.readouterr().err
    named = [name for names in splits.drawn.values() for name in names]
    assert sorted(int(name.rpartition(" ")[2]) for name in named) == [*range(2, 62)], "the lines of the file"
    assert {split: len(names) for split, names in splits.drawn.items()} == splits.facts["counts"]


def test_the_most_frequent_class_of_train_is_the_baseline_and_one_class_alone_is_warned_of():
    generator = np.random.default_rng(0)
    train, truth = generator.choice(3, 200, p=[0.2, 0.5, 0.3]), generator.choice(3, 50)
    metric = TextClasses()
    metric.compute(predictions=generator.normal(size=(50, 3)), references=truth)
    facts, lines = baselines.of_classes(train, metric.confusion, ["a", "b", "c"])
    dummy = DummyClassifier(strategy="most_frequent").fit(train[:, None], train)
    assert facts == {"class": "b", "accuracy": accuracy_score(truth, dummy.predict(truth[:, None]))}
    assert lines == [
        f"always b, the most frequent class in training, gives accuracy {facts['accuracy']:.4f} on this test"
    ]
    metric.compute(predictions=np.tile([0.0, 0.0, 1.0], (50, 1)), references=truth)
    assert baselines.of_classes(train, metric.confusion, ["a", "b", "c"])[1][1].startswith(
        "warning: 100% of the answers are c"
    )


def test_the_mean_of_train_is_the_baseline_of_numbers():
    generator = np.random.default_rng(0)
    train, truth, called = generator.normal(3, 2, 200), generator.normal(3, 2, 50), generator.normal(3, 0.1, 50)
    metric = Numbers()
    scores = metric.compute(predictions=called.astype(np.float32), references=truth.astype(np.float32))
    assert scores["mae"] == pytest.approx(mean_absolute_error(truth, called), rel=1e-6)
    assert scores["rmse"] == pytest.approx(mean_squared_error(truth, called) ** 0.5, rel=1e-6)
    facts, (line,) = baselines.of_numbers(float(train.mean()), metric.called, metric.truth)
    dummy = DummyRegressor().fit(train[:, None], train).predict(truth[:, None])
    assert facts["mae"] == pytest.approx(mean_absolute_error(truth, dummy), rel=1e-6)
    assert facts["rmse"] == pytest.approx(mean_squared_error(truth, dummy) ** 0.5, rel=1e-6)
    assert line.startswith(f"mean absolute error {scores['mae']:.4g}, {facts['mae']:.4g} by always saying")


def test_a_run_is_tested_on_all_of_other_data_that_have_no_splits(tmp_path):
    (tmp_path / "new.csv").write_text("text,label\n" + "".join(f"text {n},{'ab'[n % 2]}\n" for n in range(40)))
    tested = task("new.csv")
    tested.whole_test = True
    splits = tested.load(tokenizer=word_tokenizer(), max_length=512, data_dir=tmp_path)
    assert splits.facts["counts"] == {"test": 40}
    assert not splits.facts["warnings"], "that train and test are the same rows is no leak"
    assert splits.facts["split_rule"] == "all of it is the test"


def test_a_run_is_tested_on_texts_that_lack_one_of_its_classes(tmp_path):
    (tmp_path / "new.csv").write_text("text,label\n" + "".join(f"text {n},c\n" for n in range(12)))
    tested = task("new.csv")
    tested.whole_test, tested.trained_classes = True, ["a", "b", "c"]
    splits = tested.load(tokenizer=word_tokenizer(), max_length=512, data_dir=tmp_path)
    assert splits.class_names == ["a", "b", "c"]
    assert set(splits.test.values["labels"].tolist()) == {2}


@pytest.mark.parametrize("label", ["1.500,0", "1,500.0", "1 500", "1500,5"])
def test_numbers_with_separators_are_said_to_be_none(tmp_path, capsys, label):
    (tmp_path / "prices.csv").write_text(
        "text;label\n" + "".join(f"text {n};{n % 3 + 1}{label[1:]}\n" for n in range(60))
    )
    assert len(load(tmp_path, "prices.csv").class_names) == 3
    assert "its labels look like numbers with separators" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"as task.kind=regression needs: write it as 1234\.5$"):
        load(tmp_path, "prices.csv", kind="regression")
