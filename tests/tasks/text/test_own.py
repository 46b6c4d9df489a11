"""Own texts: every format and layout, which column is what, classes or numbers, what is refused in one line."""

import json

import numpy as np
import pandas
import pytest
import torch
from datasets import ClassLabel, Features, Value
from pyarrow import parquet as pq
from pyarrow import table

from flora.config import composed, instantiate
from flora.errors import ConfigError, DataError
from flora.methods import Full
from flora.models import TransformersModel
from flora.tasks import Text
from flora.tasks.metrics import TextClasses
from flora.training import Protocol, Run, TrainerSettings
from tests.tasks.texts import SPECIAL, WORDS, word_tokenizer

ROWS = [
    {"text": f"the {('cat', 'dog', 'mat')[i % 3]} sat {'on ' * (i // 3)}", "label": "abc"[i % 3]} for i in range(30)
]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


def task(dataset=".", **options):
    return Text(**{"name": "text", "dataset": dataset, "epochs": 1, "max_length": 16} | options)


def load(folder, dataset=".", **options):
    return task(dataset, **options).load(tokenizer=word_tokenizer(), max_length=512, data_dir=folder)


def write(path, rows=ROWS, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pandas.DataFrame(rows)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        frame.to_csv(path, index=False, **{"sep": "\t" if path.suffix == ".tsv" else ","} | options)
    else:
        frame.to_json(path, orient="records", lines=path.suffix == ".jsonl")
    return path


def words(split, row):
    return [[*SPECIAL, *WORDS][i] for i in split[row]["input_ids"]]


@pytest.mark.parametrize("name", ["own.csv", "own.tsv", "own.jsonl", "own.json", "own.parquet"])
def test_every_format_gives_the_same_data(tmp_path, name, capsys):
    write(tmp_path / name)
    splits = load(tmp_path, name)
    assert splits.class_names == ["a", "b", "c"]
    assert splits.facts["counts"] == {"train": 18, "validation": 6, "test": 6}
    assert splits.facts["split_rule"] == "drawn 70/15/15 % train/validation/test of each class, seed 0"
    assert [np.bincount(getattr(splits, s).values["labels"]).tolist() for s in splits.facts["counts"]] == [
        [6, 6, 6],
        [2, 2, 2],
        [2, 2, 2],
    ]
    for split in (splits.train, splits.test):
        for row in range(6):
            noun = ("cat", "dog", "mat")[int(split.values["labels"][row])]
            assert words(split, row)[1:4] == ["the", noun, "sat"]
    assert list(splits.facts["files"]) == [name]
    said = capsys.readouterr().err
    assert said.startswith(f"{name}: text in text, label in label, 3 classes as its labels are words (task.text, ")
    assert said.count("\n") == 1
    json.dumps(splits.facts)
    assert load(tmp_path).facts["counts"] == splits.facts["counts"], "alone in its folder it is found"
    assert task(name).files(tmp_path) == (tmp_path, [tmp_path / name])


@pytest.mark.parametrize(
    "names", [("train", "validation", "test"), ("train-00000-of-00001", "dev", "test"), ("training", "val", "test")]
)
def test_splits_that_are_files_are_taken_as_they_are(tmp_path, names):
    for number, name in enumerate(names):
        write(tmp_path / "own" / f"{name}.csv", ROWS[: 30 - 3 * number])
    (tmp_path / "own" / "manifest.json").write_text('{"files": {}}')
    splits = load(tmp_path, "own")
    assert splits.facts["counts"] == {"train": 30, "validation": 27, "test": 24}
    assert splits.facts["split_rule"] == "as in the files"
    assert splits.facts["warnings"] == [
        "27 of 27 texts of validation are in train as well",
        "24 of 24 texts of test are in train as well",
    ]
    with pytest.raises(ConfigError, match=r"task\.split=\[1, 1, 1\]: there is train and validation and test already"):
        load(tmp_path, "own", split=[1, 1, 1])


@pytest.mark.parametrize("other", ["validation", "test"])
def test_of_two_splits_one_is_the_test_and_a_part_of_train_is_chosen_on(tmp_path, other):
    write(tmp_path / "train.csv")
    write(tmp_path / f"{other}.csv", ROWS[:9])
    splits = load(tmp_path, held_out=0.2)
    assert splits.facts["counts"] == {"train": 24, "validation": 6, "test": 9}
    assert splits.facts["split_rule"] == "validation a drawn 20% of train, seed 0"


@pytest.mark.parametrize(
    ("columns", "options", "chosen"),
    [
        ({"Review": "text", "Sentiment": "label"}, {}, (["Review"], "Sentiment")),
        ({"premise": "text", "hypothesis": "text", "label": "label"}, {}, (["premise", "hypothesis"], "label")),
        (
            {"notes": "text", "id": "text", "outcome": "label"},
            {"text": "notes", "label": "outcome"},
            (["notes"], "outcome"),
        ),
        (
            {"q": "text", "text": "text", "gold": "label"},
            {"text": "q", "text_pair": "text", "label": "gold"},
            (["q", "text"], "gold"),
        ),
    ],
)
def test_columns_have_usual_names_or_are_named(tmp_path, columns, options, chosen):
    write(tmp_path / "own.csv", [{name: row[of] for name, of in columns.items()} for row in ROWS])
    splits = load(tmp_path, **options)
    assert splits.facts["columns"] == {"texts": chosen[0], "label": chosen[1]}
    assert int(splits.train[0]["token_type_ids"].max()) == len(chosen[0]) - 1


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([10, 2, 1], ["1", "2", "10"]),
        (["10", "2", "1"], ["1", "2", "10"]),
        ([True, False, True], ["False", "True"]),
        (["NA", "None", "null"], ["NA", "None", "null"]),
        ([1.0, 2.0, 3.0], ["1", "2", "3"]),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_labels_are_classes_whatever_they_are_written_as(tmp_path, labels, classes, suffix):
    write(tmp_path / f"own{suffix}", [row | {"label": labels[i % 3]} for i, row in enumerate(ROWS)])
    assert load(tmp_path).class_names == classes


def test_class_names_of_a_parquet_file_are_kept_in_their_order(tmp_path):
    features = Features(text=Value("string"), label=ClassLabel(names=["zebra", "ant", "never"]))
    columns = {"text": [row["text"] for row in ROWS], "label": [i % 2 for i in range(30)]}
    pq.write_table(table(columns, schema=features.arrow_schema), tmp_path / "own.parquet")
    assert load(tmp_path).class_names == ["zebra", "ant"]


def test_numbers_with_fractions_are_predicted_in_their_own_units(tmp_path, capsys):
    write(tmp_path / "own.csv", [row | {"label": 1000 + i * 10.5} for i, row in enumerate(ROWS)])
    mine = task()
    splits = mine.load(tokenizer=word_tokenizer(), max_length=512, data_dir=tmp_path)
    assert "a number as its labels are numbers with fractions" in capsys.readouterr().err
    assert (splits.num_classes, mine.metric) == (1, "pearson")
    assert splits.train.values["labels"].dtype == torch.float32
    mean, deviation = splits.facts["labels"].values()
    assert mean == pytest.approx(float(splits.train.values["labels"].mean()))

    class Zero(torch.nn.Module):
        def forward(self, **batch):
            return type("Output", (), {"logits": torch.ones(2, 1)})

    outputs, targets = mine.forward(None)(Zero(), {"labels": torch.tensor([mean, mean + deviation])}, True)
    assert outputs.flatten().tolist() == pytest.approx([mean + deviation] * 2)
    assert mine.loss(outputs, targets, 0.0).item() == pytest.approx(0.5)
    again = task()
    again.remember(json.loads(json.dumps(splits.facts)))
    assert torch.equal(again.forward(None)(Zero(), {"labels": targets}, False)[0], outputs)
    scores = mine.metrics().compute(predictions=outputs.numpy(), references=targets.numpy())
    assert set(scores) == {"pearson", "spearmanr", "mae", "rmse"}


def test_whole_numbers_are_predicted_where_that_is_asked_for(tmp_path):
    write(tmp_path / "own.csv", [row | {"label": i} for i, row in enumerate(ROWS)])
    assert load(tmp_path, kind="regression").num_classes == 1
    with pytest.raises(DataError, match=r"no class has the three rows .*numbers to predict need task\.kind=regression"):
        load(tmp_path)
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "test.csv", [row | {"label": i} for i, row in enumerate(ROWS)])
    with pytest.raises(DataError, match=r"test has 30 of its classes only there, not in train \(0, 1, 2, 3, \.\.\.\)"):
        load(tmp_path)


def test_macro_f1_is_that_of_scikit_learn_over_classes_that_occur():
    from sklearn.metrics import f1_score

    truth = np.array([0, 0, 1, 1, 1, 3])
    logits = np.eye(4)[[0, 1, 1, 1, 2, 3]]
    metric = TextClasses()
    scores = metric.compute(predictions=logits, references=truth)
    parts = f1_score(truth, logits.argmax(1), average=None, labels=[0, 1, 3])
    assert scores["macro_f1"] == pytest.approx(parts.mean())
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert metric.confusion.tolist() == [[1, 1, 0, 0], [0, 2, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]


TEXT = "text,label\nthe cat,a\n"


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        (TEXT + ",b\n", {}, r"own\.csv, line 3: column text is empty: fill it in or set task\.missing=skip"),
        (TEXT + "a dog,\n the cat,\n", {}, r"own\.csv, line 3: column label is empty \(2 such rows\)"),
        (TEXT + "a dog,b,c\n", {}, r"own\.csv, line 3: 3 cells, but the header has 2: put quotes around texts"),
        (TEXT + '"a dog,b\n', {}, r"own\.csv cannot be read \(line 3: .*a quote is not closed"),
        (TEXT, {}, "train has one class, a: there is nothing to tell apart"),
        ("text,label\n", {}, r"own\.csv: no rows"),
        ("", {}, r"own\.csv: no rows"),
        ("text,text\na,b\n", {}, "two columns are called 'text'"),
        (b"text,label\nthe cat,a\ncaf\xe9,b\n", {}, r"own\.csv, line 3, is not UTF-8: save it with that encoding"),
        (TEXT.encode("utf-16"), {}, r"own\.csv \(it is UTF-16\) is not UTF-8"),
        (
            TEXT,
            {"kind": "regression"},
            r"own\.csv, line 2: label 'a' is no finite number, as task\.kind=regression needs",
        ),
        ("text,label\na,inf\nb,1.5\n", {"kind": "regression"}, "label 'inf' is no finite number"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_a_line(tmp_path, content, options, said):
    (tmp_path / "own.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=said) as error:
        load(tmp_path, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"text": "txet"}, ConfigError, r"task\.text=txet is no column; did you mean text\? there are text, label"),
        ({"label": "klass"}, ConfigError, r"task\.label=klass is no column; there are text, label"),
        ({"text": "label"}, ConfigError, "name one column twice: label, label"),
        (
            {"metric": "pearson"},
            ConfigError,
            r"task\.metric=pearson is not for classification: choose accuracy or macro_f1",
        ),
        ({"dataset": "elsewhere.json"}, DataError, r"there is no .*elsewhere\.json: set paths\.data"),
        ({"dataset": "owm.csv"}, DataError, r"there is no .*owm\.csv: did you mean own\.csv\? set paths\.data"),
        ({"dataset": "my/own words"}, DataError, "there is no .*my/own words: set paths.data"),
        ({"dataset": "someone/something"}, DataError, "nothing called someone/something comes from the hub"),
    ],
)
def test_what_is_asked_for_and_not_there_is_said_with_what_there_is(tmp_path, options, error, said):
    write(tmp_path / "own.csv")
    with pytest.raises(error, match=said):
        load(tmp_path, **options)


@pytest.mark.parametrize(
    "option",
    [
        {"kind": "ranking"},
        {"metric": "bleu"},
        {"missing": "ignore"},
        {"text_pair": "b"},
        {"max_length": 0},
        {"held_out": 1},
    ],
)
def test_settings_out_of_range_are_refused(option):
    with pytest.raises(ConfigError, match=f"task.{next(iter(option))}="):
        task(**option)


def test_without_usual_names_the_columns_are_listed(tmp_path):
    write(tmp_path / "own.csv", [{"foo": "the cat", "label": "a"}])
    with pytest.raises(
        ConfigError, match=r"task\.text: none of the columns has a usual name: .*; there are foo, label"
    ):
        load(tmp_path)


def test_a_folder_of_several_files_asks_which(tmp_path):
    for name in ("spring.csv", "autumn.csv"):
        write(tmp_path / name)
    with pytest.raises(DataError, match=r"needs train, .*it has autumn\.csv, spring\.csv: task\.dataset=autumn\.csv"):
        load(tmp_path)
    write(tmp_path / "train.csv")
    write(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"has train as train\.csv and train\.jsonl: remove all but one"):
        load(tmp_path)


def test_a_class_of_a_test_alone_is_an_error_and_one_that_a_test_lacks_is_said(tmp_path, capsys):
    write(tmp_path / "train.csv")
    write(tmp_path / "test.csv", [row for row in ROWS if row["label"] != "b"])
    assert (
        "test has no example of 1 of 3 classes (b); its metrics are over the others" in load(tmp_path).facts["warnings"]
    )
    assert "test has no example of 1 of 3 classes (b)" in capsys.readouterr().err
    write(tmp_path / "test.csv", [row | {"label": "-1"} for row in ROWS])
    with pytest.raises(DataError, match=r"test has 1 of its classes only there, not in train \(-1\).*hidden ones"):
        load(tmp_path)


def test_a_split_without_the_columns_of_train_is_named(tmp_path):
    write(tmp_path / "train.csv")
    write(tmp_path / "test.csv", [{"text": "the cat"}])
    with pytest.raises(ConfigError, match=r"test: task\.label=label is no column; there are text"):
        load(tmp_path)


def test_rows_that_lack_something_are_skipped_where_that_is_asked_for(tmp_path, capsys):
    rows = [*ROWS, {"text": None, "label": "a"}, {"text": "the cat", "label": None}, {"text": " ", "label": "b"}]
    write(tmp_path / "own.jsonl", rows)
    splits = load(tmp_path, missing="skip")
    assert splits.facts["missing"] == {"policy": "skip", "left_out": {"train": 3}}
    assert sum(splits.facts["counts"].values()) == 30
    assert "3 rows without a text or a label are left out" in capsys.readouterr().err


def test_bom_semicolons_quotes_and_lines_in_a_text_are_read(tmp_path):
    rows = [row | {"text": f'{row["text"]}; "the\ncat"'} for row in ROWS]
    write(tmp_path / "own.csv", rows, sep=";", encoding="utf-8-sig")
    splits = load(tmp_path, max_length=64)
    assert splits.facts["columns"] == {"texts": ["text"], "label": "label"}
    assert words(splits.train, 0)[-3:-1] == ["cat", "[UNK]"]


def test_long_texts_are_cut_and_counted(tmp_path, capsys):
    write(tmp_path / "own.csv")
    splits = load(tmp_path, max_length=8)
    assert sum(splits.facts["truncated"].values()) == 18
    assert max(splits.train.lengths) == 8
    assert "18 texts are longer than task.max_length or the model takes, and are cut" in capsys.readouterr().err


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 24,
    "initializer_range": 0.2,
}
NETWORKS = {
    "bert": {"model_type": "bert", **SIZES},
    "llama": {"model_type": "llama", "num_key_value_heads": 2, "pad_token_id": 0, **SIZES},
}


@pytest.fixture
def tokenizer_folder(tmp_path):
    word_tokenizer().save_pretrained(tmp_path / "words")
    return str(tmp_path / "words")


@pytest.mark.parametrize("network", NETWORKS)
def test_an_encoder_and_a_language_model_learn_to_tell_texts_apart(tmp_path, network, tokenizer_folder):
    write(tmp_path / "data" / "own.csv", ROWS * 4)
    spec = TransformersModel(
        "tiny", "sequence_classification", NETWORKS[network], pretrained=False, tokenizer=tokenizer_folder
    )
    assert spec.classifier == [{"bert": "classifier", "llama": "score"}[network]]
    mine = task(max_length=16)
    splits = mine.load_for(spec, tmp_path / "data")
    settings = TrainerSettings(epochs=20, lr=3e-3, batch_size=16, device="cpu")
    method = Full("full")
    outcome = Run(mine, spec, method, settings, Protocol("holdout", "best", "train"), splits, 0, tmp_path).train()
    assert outcome.metrics["accuracy"] == 1.0
    assert outcome.metrics["macro_f1"] == 1.0
    assert (tmp_path / "confusion.png").stat().st_size > 1000


def test_a_language_model_is_read_at_its_last_word_whatever_pads(tmp_path, tokenizer_folder):
    """Its tokenizer has another pad token than the network, or none: the network must find the end of the text."""
    sizes = NETWORKS["llama"] | {"pad_token_id": None, "eos_token_id": 3}
    spec = TransformersModel("tiny", "sequence_classification", sizes, pretrained=False, tokenizer=tokenizer_folder)
    write(tmp_path / "data" / "own.csv")
    mine = task()
    splits = mine.load_for(spec, tmp_path / "data")
    network = spec.build(3).eval()
    batch = splits.train.__getitems__([0, len(splits.train) - 1])
    together = mine.forward(spec)(network, batch, False)[0]
    alone = [mine.forward(spec)(network, splits.train.__getitems__([i]), False)[0] for i in (0, len(splits.train) - 1)]
    assert len({len(splits.train[i]["input_ids"]) for i in (0, len(splits.train) - 1)}) == 2
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["smollm2_135m", "llama_7b"])
def test_the_task_gives_a_language_model_a_classifier(model):
    spec = instantiate(composed(["task=text", f"model={model}"]).model)
    assert (spec.kind, spec.classifier) == ("sequence_classification", ["score"])
    assert spec.config().pad_token_id == 2
    task().accepts(spec)
    with pytest.raises(ConfigError, match=r"has no classifier: .*model\.kind=sequence_classification"):
        task().accepts(instantiate(composed([f"model={model}"]).model))
