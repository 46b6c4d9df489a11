"""GLUE: every place the data can lie, what is held out, the metrics against formulas, and bad files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

import flora.models
from flora.errors import ConfigError, DataError
from flora.tasks import Glue, manifest
from flora.tasks.glue.datasets import DATASETS
from flora.tasks.metrics import Glue as GlueMetric
from tests.tasks.texts import word_tokenizer, write_rows

# GLUE's own numbers of rows: the paper's table 1, and gluebenchmark.com for MNLI's two sets.
CONFIGS = Path(__file__).parents[3] / "configs"
SENTENCES = ["the cat sat", "a dog ran", "the dog slept", "a cat ran on the mat"]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))


def configured(name, *overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", [f"task={name}", *overrides]).task


def task(dataset, **options):
    return Glue(**{"name": "glue", "dataset": dataset, "epochs": 1, "max_length": 16, "held_out": 0.25} | options)


def load(dataset, folder, **options):
    return task(dataset, **options).load(tokenizer=word_tokenizer(), max_length=512, data_dir=folder)


@pytest.fixture
def write(tmp_path):
    """Writes glue/DATASET/SPLIT.parquet with rows labelled in turn; columns can be replaced."""

    def call(dataset, split, rows=8, **columns):
        info = DATASETS[dataset]
        made = {name: [SENTENCES[(i + k) % 4] for i in range(rows)] for k, name in enumerate(info.columns)}
        classes = len(info.classes)
        made["label"] = [i % classes for i in range(rows)] if classes else [i % 6 * 0.9 for i in range(rows)]
        return write_rows(tmp_path / "glue" / dataset / f"{split}.parquet", made | columns)

    return call


@pytest.mark.parametrize("dataset", list(DATASETS))
def test_every_dataset_loads_with_its_columns_and_classes(tmp_path, write, dataset):
    for split in DATASETS[dataset].rows:
        write(dataset, split)
    splits = load(dataset, tmp_path)
    assert splits.num_classes == {"stsb": 1, "mnli": 3}.get(dataset, 2)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (6, 2, 8)
    assert set(splits.further_tests) == ({"mismatched"} if dataset == "mnli" else set())
    batch = splits.test.__getitems__([0])
    pair = len(DATASETS[dataset].columns) == 2
    assert int(batch["token_type_ids"].max()) == pair
    assert batch["labels"].dtype == (torch.float32 if dataset == "stsb" else torch.int64)
    assert splits.facts["files"]["train.parquet"]["rows"] == 8
    assert f"train has 8 rows, GLUE has {DATASETS[dataset].rows['train']}" in splits.facts["warnings"]
    json.dumps(splits.facts)


def test_the_strict_protocol_holds_out_train_and_the_published_one_nothing(tmp_path, write):
    write("rte", "train", 8, sentence1=["cat " * (i + 1) for i in range(8)])  # every row has its own length
    write("rte", "validation", 4)
    strict, again, published = load("rte", tmp_path), load("rte", tmp_path), load("rte", tmp_path, held_out=0)
    lengths = [sorted(part.lengths) for part in (strict.train, strict.validation, published.train)]
    assert sorted(lengths[0] + lengths[1]) == lengths[2]
    assert strict.validation.lengths == again.validation.lengths
    assert published.validation is published.test
    assert strict.validation is not strict.test
    assert load("rte", tmp_path, split_seed=3).validation.lengths != strict.validation.lengths


def labels_of(split):
    return split.values["labels"].tolist()


@pytest.mark.parametrize("seed", range(4))
def test_a_tenth_of_every_class_is_held_out(tmp_path, write, seed):
    write("rte", "train", 60, label=[0] * 40 + [1] * 20)
    write("rte", "validation", 4)
    splits = load("rte", tmp_path, held_out=0.1, stratify=True, split_seed=seed)
    assert sorted(labels_of(splits.validation)) == [0] * 4 + [1] * 2
    assert sorted(labels_of(splits.train)) == [0] * 36 + [1] * 18
    assert splits.facts["split_rule"] == (
        f"validation a drawn 10% of each class of train, seed {seed}; test the development set"
    )


def test_a_tenth_of_every_unit_of_the_score_of_stsb_is_held_out(tmp_path, write):
    scores = [unit + k / 20 for unit in range(5) for k in range(20)]  # twenty from 0, 1, 2, 3 and 4 on
    scores[-10:] = [5.0] * 10
    write("stsb", "train", 100, label=scores)
    write("stsb", "validation", 4)
    splits = load("stsb", tmp_path, held_out=0.1, stratify=True)
    held = [min(int(score), 4) for score in labels_of(splits.validation)]
    assert sorted(held) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert "10% of each unit of the score of train" in splits.facts["split_rule"]
    other = load("stsb", tmp_path, held_out=0.1, stratify=True, split_seed=1)
    assert labels_of(other.validation) != labels_of(splits.validation)


def test_runs_hold_out_by_class_and_records_from_before_say_that_they_did_not():
    assert configured("glue").stratify is True
    assert task("rte").stratify is False  # what a config that says nothing means


OFFICIAL = {
    "cola": ("CoLA", ["gj04\t1\t\tthe cat sat", "gj04\t0\t*\ta dog ran"]),
    "sst2": ("SST-2", ["sentence\tlabel", "the cat sat\t1", "a dog ran\t0"]),
    "mrpc": (
        "MRPC",
        ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t1\t2\tthe "cat\tsat', "0\t1\t2\ta\tdog"],
    ),
    "stsb": (
        "STS-B",
        [
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
            *(f"{i}\tm\tm\t12\t1\tn\tn\tthe cat\ta dog\t{score}" for i, score in enumerate([5.0, 1.25])),
        ],
    ),
    "rte": ("RTE", ["index\tsentence1\tsentence2\tlabel", "0\ta\tb\tnot_entailment", "1\ta\tb\tentailment"]),
    "qqp": (
        "QQP",
        ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\ta\tb\t1", "broken", "1\t2\t3\ta\tb\t0"],
    ),
    "wnli": ("WNLI", ["index\tsentence1\tsentence2\tlabel", "0\ta\tb\t1", "1\ta\tb\t0"]),
}


@pytest.mark.parametrize("dataset", list(OFFICIAL))
def test_official_files_are_read_as_they_are(tmp_path, dataset):
    folder, lines = OFFICIAL[dataset]
    (tmp_path / "glue" / folder).mkdir(parents=True)
    for name in ("train", "dev"):
        (tmp_path / "glue" / folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    splits = load(dataset, tmp_path, held_out=0)
    assert splits.test.values["labels"].tolist() == ([5.0, 1.25] if dataset == "stsb" else [1, 0])
    assert splits.facts["source"] == "paths.data"
    assert splits.facts["files"]["dev.tsv"].get("left_out") == (1 if dataset == "qqp" else None)


def test_mnli_has_two_official_development_files(tmp_path):
    (tmp_path / "glue" / "MNLI").mkdir(parents=True)
    for name, label in {"train": "neutral", "dev_matched": "entailment", "dev_mismatched": "contradiction"}.items():
        text = f"index\tsentence1\tsentence2\tlabel1\tgold_label\n0\ta\tb\tneutral\t{label}\n"
        (tmp_path / "glue" / "MNLI" / f"{name}.tsv").write_text(text)
    splits = load("mnli", tmp_path, held_out=0)
    assert splits.train.values["labels"].tolist() == [1]
    assert splits.test.values["labels"].tolist() == [0]
    assert splits.further_tests["mismatched"].values["labels"].tolist() == [2]


def test_the_hub_comes_last_and_its_absence_is_said(tmp_path, write, monkeypatch):
    with pytest.raises(DataError, match=r"no data for rte.*holds no train.*hub nyu-mll/glue: HF_HUB_OFFLINE"):
        load("rte", tmp_path / "empty")
    for split in DATASETS["rte"].rows:
        write("rte", split)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: str(tmp_path / "glue"))
    assert load("rte", None).facts["source"] == "hub nyu-mll/glue"


@pytest.mark.parametrize(
    ("dataset", "columns", "message"),
    [
        ("rte", {"label": [0] * 7 + [2]}, r"train\.parquet, row 7: label 2, outside 0\.\.1 \(1 such rows\)"),
        ("rte", {"label": [-1] * 8}, "hidden labels of a test split"),
        ("rte", {"label": [0.5] * 8}, "label 0.5"),
        ("rte", {"label": [None] + [0] * 7}, "row 0: label None"),
        ("rte", {"label": ["yes"] * 8}, "no numbers"),
        ("stsb", {"label": [1.0] * 7 + [float("nan")]}, r"row 7: label nan, outside 0\.\.5"),
        ("stsb", {"label": [5.5] * 8}, "label 5.5"),
        ("rte", {"sentence2": ["a"] * 7 + [None]}, "row 7: column sentence2 holds None"),
    ],
)
def test_bad_rows_are_named(tmp_path, write, dataset, columns, message):
    write(dataset, "train", **columns)
    write(dataset, "validation")
    with pytest.raises(DataError, match=message):
        load(dataset, tmp_path)


def test_bad_files_are_named(tmp_path, write):
    write("sst2", "validation")
    write_rows(tmp_path / "glue" / "sst2" / "train.parquet", {"text": ["a"], "label": [0]})
    with pytest.raises(DataError, match=r"no column sentence \(it has text, label\)"):
        load("sst2", tmp_path)
    write("sst2", "train", rows=0)
    with pytest.raises(DataError, match="no rows"):
        load("sst2", tmp_path)
    (tmp_path / "glue" / "sst2" / "train.parquet").write_bytes(b"PAR1 half")
    with pytest.raises(DataError, match="not a readable parquet"):
        load("sst2", tmp_path)
    (tmp_path / "glue" / "RTE").mkdir()
    (tmp_path / "glue" / "RTE" / "train.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\n")
    (tmp_path / "glue" / "RTE" / "dev.tsv").touch()
    with pytest.raises(DataError, match=r"train\.tsv: no rows of 4 columns"):
        load("rte", tmp_path)


def test_a_file_that_changed_since_it_was_prepared_is_refused(tmp_path, write):
    folder = write("rte", "train").parent
    write("rte", "validation")
    manifest.write(folder, {"files": {"train.parquet": {"sha256": "0" * 64}}})
    with pytest.raises(DataError, match="changed since it was prepared"):
        load("rte", tmp_path)


def test_what_is_cut_is_counted_in_the_record(tmp_path, write):
    write("rte", "train")
    write("rte", "validation", sentence1=["the cat " * 20] * 3 + ["a"] * 5)
    facts = load("rte", tmp_path).facts
    assert facts["truncated"] == {"train": 0, "validation": 3}
    assert facts["max_length"] == 16


def test_a_regression_has_the_squared_error():
    outputs, labels = torch.tensor([[1.0], [4.0]]), torch.tensor([2.0, 2.0])
    assert task("stsb").loss(outputs, labels, 0.0).item() == pytest.approx((1 + 4) / 2)


def matthews(tp, tn, fp, fn):
    return (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))


def test_metrics_are_those_of_glue():
    references = np.array([1] * 6 + [0] * 4)
    predictions = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 1])  # tp 4, fn 2, tn 3, fp 1
    logits = np.eye(2)[predictions]
    assert GlueMetric("cola").compute(predictions=logits, references=references) == {
        "matthews_correlation": pytest.approx(matthews(4, 3, 1, 2))
    }
    assert GlueMetric("mrpc").compute(predictions=logits, references=references) == {
        "accuracy": 0.7,
        "f1": pytest.approx(2 * 4 / (2 * 4 + 1 + 2)),
    }
    assert GlueMetric("rte").compute(predictions=logits, references=references) == {"accuracy": 0.7}
    x, y = np.array([1.0, 2.0, 4.0, 3.0]), np.array([1.0, 2.0, 3.0, 5.0])
    scores = GlueMetric("stsb").compute(predictions=x[:, None], references=y)
    assert scores["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
    assert scores["spearmanr"] == pytest.approx(0.8)
    assert scores["mean_correlation"] == pytest.approx((np.corrcoef(x, y)[0, 1] + 0.8) / 2, abs=1e-6)


def test_outputs_that_are_not_finite_score_nothing():
    nan = np.full((4, 2), np.nan)
    references = [0, 0, 1, 1]
    assert GlueMetric("mrpc").compute(predictions=nan, references=references) == {"accuracy": 0.0, "f1": 0.0}
    assert GlueMetric("cola").compute(predictions=nan, references=references)["matthews_correlation"] == 0
    assert GlueMetric("stsb").compute(predictions=nan[:, :1], references=[0.0, 1, 2, 3]) == {
        "pearson": 0.0,
        "spearmanr": 0.0,
        "mean_correlation": 0.0,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dataset": "rtee"}, "did you mean rte"), ({"held_out": 1.0}, "held_out"), ({"max_length": 0}, "max_length")],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        task(**{"dataset": "rte"} | options)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("convnext", "model=convnext reads images"),
        ("smollm2_135m", "model=smollm2_135m writes text and has no classifier"),
        ("llava_mini", "model=llava_mini writes text and has no classifier"),
    ],
)
def test_models_of_another_kind_are_refused(model, message):
    with pytest.raises(ConfigError, match=message):
        task("rte").load_for(flora.models.get(model), None)


@pytest.mark.data
@pytest.mark.parametrize("dataset", ["cola", "sst2", "mrpc", "stsb", "rte", "wnli"])
def test_the_real_files_have_the_official_rows_and_shares(data_folder, dataset):
    splits = load(dataset, data_folder, held_out=0.1, stratify=True)
    assert splits.facts["warnings"] == []
    shares = [
        np.bincount(np.floor(labels_of(part)).astype(int), minlength=6) for part in (splits.train, splits.validation)
    ]
    whole = (shares[0] + shares[1]) / (len(splits.train) + len(splits.validation))
    assert np.abs(shares[1] / len(splits.validation) - whole).max() < 0.02
