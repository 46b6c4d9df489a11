"""Records that cannot be what they say: each is named and left out, and none that can be is."""

import json

import pytest

from flora.config import composed, recorded_id, semantic_config
from flora.files import ROOT
from flora.results import Store
from flora.results.store import read
from tests.results.test_store import named, record, settings

RESNET = ["model=timm", "model.timm_name=resnet10t"]
UNSOUND = [
    *({key: -1} for key in ("train_seconds", "examples_per_second", "peak_memory_bytes", "gpu_busy_share")),
    *({key: "1"} for key in ("examples_per_second", "peak_memory_bytes", "gpu_busy_share", "lr", "method_version")),
    {"peak_memory_bytes": 1.5},
    {"gpu_busy_share": 1.01},
    {"head_params": 1001},
    {"started": "2026-01-02T00:00:00+00:00"},
    {"finished": "2026-01-01T01:00:00+02:00"},
    *({"ranks": odd} for odd in ([], {"layer": 2}, {"layer": ["2"]}, {"layer": [-1]}, None)),
    *(
        {"selection": odd}
        for odd in ([], None, {"chosen": 1e-3}, {"values": {"0.001": "x"}, "chosen": 1, "seconds": 1})
    ),
    {"selection": {"values": {"0.001": 0.5}, "chosen": 0.001, "seconds": -1}},
    {"selection": {"values": {"0.5": 0.5}, "chosen": 0.5, "seconds": 1}},
    *({"skipped_layers": odd} for odd in ("layer", [1], {}, None)),
    *({"history": odd} for odd in ([1], [{"loss": True}], [[]], "x")),
    *({"execution": odd} for odd in ([], {"compile": "no"}, {"resumed_at_steps": 3}, {"resumed_at_steps": [-3]}, None)),
    *({"versions": odd} for odd in ([], {"torch": 2})),
    *({key: 1} for key in ("command", "error", "commit", "lock", "adapter_path", "deterministic", "dirty", "masked")),
    {"model": "efficientnet_lite0"},
    *({"split": odd} for odd in ("validation", "train", 1)),
    {"mode": "predict"},
]


def test_broken_records_are_reported_and_left_out(tmp_path):
    store = Store(tmp_path)
    good = store.write(record("good"))
    content = json.loads(good.read_text())
    task = content["config"]["task"]

    def plant(name, **changes):
        config = content["config"] | {"task": task | {"name": name}}
        own = {"run_id": recorded_id(config), "config": config, "task": name} | changes
        (tmp_path / f"{named(name)}.json").write_text(json.dumps(content | own))
        planted.add(named(name))

    planted = {"truncated", "list", "bytes", "deep"}
    (tmp_path / "truncated.json").write_text(good.read_text()[:100])
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    plant("schema", schema_version=99)
    plant("nan", value=float("nan"))
    plant("metric", metrics={"accuracy": 0.5, "loss": float("inf")})
    plant("true", value=True)
    plant("huge", value=10**400)
    plant("seconds", train_seconds="a minute")
    plant("params", trainable_params=None)
    plant("text", value="abc")
    plant("metrics", metrics=3)
    plant("no_metrics", metrics=0)
    plant("seed", seed=None)
    plant("seed_text", seed="0")
    plant("empty_model", total_params=0)
    plant("negative", head_params=-1)
    plant("true_params", trainable_params=True)
    plant("started", started="yesterday")
    plant("zone", started="2026-01-01T00:00:00")
    plant("history", history={"loss": 1})
    plant("loss", history=[{"step": 1, "loss": "low"}])
    plant("device", device=None)
    plant("weights", weights="random")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    plant("dataset", dataset=["eurosat"])
    plant("half", command="python train.py paths.data=\udcff")
    plant("finished", finished=None)
    plant("status", status="done")
    plant("copy", run_id=named("good"))  # the same run twice would count twice in a mean
    plant("above", value=1.5, metrics={"accuracy": 1.5})
    plant("below", value=-0.5, metrics={"accuracy": -0.5})
    plant("other_metric", metrics={"accuracy": 0.5, "mean_per_class_accuracy": 50.0})
    plant("no_such_metric", metrics={"exact_match": 0.5})
    plant("unlike", value=0.6)
    plant("other_seed", seed=1)
    plant("other_dataset", dataset="dtd")
    plant("other_mode", mode="eval")
    plant("other_method", adapter="lora")
    plant("other_rate", lr=0.5)
    plant("other_config", config=settings("good"))
    plant("no_config", config={})
    plant("half_config", config={"task": 1, "protocol": {}, "method_version": 1})
    plant("new_bool", schema_version=True)
    for number, changes in enumerate(UNSOUND):
        plant(f"unsound {number}", **changes)
    for _ in range(2):  # from the files, then from the cache
        contents = store.read_all()
        assert list(contents.records) == [named("good")]
        assert {problem.split(".json")[0].rpartition("/")[2] for problem in contents.problems} == planted
        assert all(len(problem.splitlines()) == 1 for problem in contents.problems)
    assert len(planted) == len(list(tmp_path.glob("*.json"))) - 1
    assert all(store.finished(name) is None for name in planted)


GRID = "protocol.lr_grid=[1e-3,1e-2]"
VALUES = {"0.001": 0.5, "0.01": 0.6, "0.1": 0.7, "1": None}  # the last one diverged
ADDED = {
    "lr": 0.1,
    "selection": {"values": VALUES, "chosen": 0.1, "added": [0.1, 1.0], "diverged": [1.0], "seconds": 1},
}
LOST = {"lr": 1e-2, "selection": {"values": {"0.001": 0.5, "0.01": None}, "chosen": 1e-2, "seconds": 1}}


@pytest.mark.parametrize(
    ("overrides", "wrong", "line"),
    [
        ([GRID, "protocol.extend=true"], ADDED, None),
        ([GRID], ADDED, "lr is 0.1, its config says [0.001, 0.01]"),
        ([GRID], LOST, "lr is 0.01, its selection chose 0.01 of ['0.001', '0.01']"),
        (["adapter=full"], {"trainable_params": 995}, "1005 parameters of the model were trained, it has 1000"),
        (["adapter=flora"], {"trainable_params": 995}, None),  # an adapter's stand beside the model's
        (["model=timm", "model.timm_name=resnet10t"], {"model": "resnet10t"}, None),
        (
            ["model=timm", "model.timm_name=resnet10t"],
            {"model": "timm"},
            "model is 'timm', its config says 'resnet10t'",
        ),
        (["task=glue", "task.dataset=rte"], {"split": "validation"}, "split is 'validation', its config says 'test'"),
        (["task=glue", "protocol=glue_paper"], {"split": "test"}, "split is 'test', its config says 'validation'"),
    ],
)
def test_a_record_agrees_with_its_config(tmp_path, overrides, wrong, line):
    config = semantic_config(composed(overrides))
    made = record()
    made.config, made.run_id = config, recorded_id(config)
    made.task, made.dataset, made.adapter = config["task"]["name"], config["task"]["dataset"], config["adapter"]["name"]
    made.protocol, made.dtype = config["protocol"]["name"], config["trainer"]["dtype"]
    made.lr = (config["protocol"]["lr_grid"] or [config["trainer"]["lr"]])[0]
    made.model = {"vtab": "convnext", "glue": "minilm_l6"}[made.task]
    for key, value in wrong.items():
        setattr(made, key, value)
    found, problem = read(Store(tmp_path).write(made))
    assert problem == (line and f"{tmp_path}/{made.run_id}.json: {line}")
    assert (found is None) == (line is not None)


def test_a_record_that_says_a_thing_twice_is_left_out(tmp_path):
    path = Store(tmp_path).write(record())
    path.write_text(path.read_text().replace('"value": 0.5', '"value": 0.7, "value": 0.5'))
    assert read(path) == (None, f"{path}: not readable as JSON ('value' stands there twice)")


@pytest.mark.parametrize("metric", ["matthews_correlation", "pearson", "my_reward"])
def test_a_metric_that_may_be_negative_is_believed(tmp_path, metric):
    made = record(value=-0.25)
    made.metric, made.metrics = metric, {metric: -0.25, "loss": 3.5}
    Store(tmp_path).write(made)
    assert Store(tmp_path).finished(made.run_id)["value"] == -0.25


def test_every_shipped_record_gives_its_id_and_agrees_with_itself():
    contents = Store(ROOT / "results" / "measured").read_all()
    assert contents.problems == []
    assert len(contents.records) == len(list((ROOT / "results" / "measured").glob("*.json")))
