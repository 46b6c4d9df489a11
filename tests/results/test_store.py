"""Records: written whole or not at all, found again by run id, never silently averaged when broken."""

import errno
import hashlib
import json
import os
import sys

import pyarrow.parquet as pq
import pytest

from flora.config import composed, recorded_id, semantic_config
from flora.errors import AlreadyRunning, CheckpointError, DataError, FailedBefore
from flora.files import ROOT, write_json
from flora.results import Record, Store
from flora.results.record import command

SETTINGS = semantic_config(composed(["task=vtab", "task.dataset=eurosat"]))


def settings(name):
    """A config; each name stands for another run."""
    return SETTINGS | {"task": SETTINGS["task"] | {"name": name}}


def named(name):
    """The id of that run."""
    return recorded_id(settings(name))


def record(name="abc", value=0.5, status="finished"):
    made = Record(
        run_id=named(name),
        method_version=1,
        task=name,
        dataset="eurosat",
        model="convnext",
        adapter="flora",
        protocol="vtab1k",
        mode="train",
        seed=0,
        config=settings(name),
        command="python train.py",
        dtype="fp32",
        device="cpu",
        started="2026-01-01T00:00:00+00:00",
    )
    made.status, made.metric, made.value, made.metrics = status, "accuracy", value, {"accuracy": value}
    made.lr, made.trainable_params, made.head_params, made.total_params = SETTINGS["trainer"]["lr"], 50, 10, 1000
    made.finished = "2026-01-01T00:01:40+00:00"
    made.train_seconds, made.examples_per_second, made.peak_memory_bytes = 2.0, 100.0, 10**6
    return made


def test_a_written_record_is_found_by_its_run_id(tmp_path):
    store = Store(tmp_path)
    path = store.write(record("abc"))
    assert path == tmp_path / f"{named('abc')}.json"
    assert store.finished(named("abc"))["value"] == 0.5
    assert store.finished(named("other")) is None


@pytest.mark.parametrize("status", ["failed", "interrupted", "running"])
def test_only_finished_records_count_as_finished(tmp_path, status):
    Store(tmp_path).write(record(status=status))
    assert Store(tmp_path).finished(named("abc")) is None


def test_a_record_with_nan_is_refused_and_the_old_file_stays(tmp_path):
    store = Store(tmp_path)
    store.write(record(value=0.5))
    with pytest.raises(ValueError, match="JSON"):
        store.write(record(value=float("nan")))
    assert store.finished(named("abc"))["value"] == 0.5
    assert sorted(os.listdir(tmp_path)) == [f"{named('abc')}.json"]  # no temporary file is left


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
    for _ in range(2):  # from the files, then from the cache
        contents = store.read_all()
        assert list(contents.records) == [named("good")]
        assert {problem.split(".json")[0].rpartition("/")[2] for problem in contents.problems} == planted
        assert all(len(problem.splitlines()) == 1 for problem in contents.problems)
    assert len(planted) == len(list(tmp_path.glob("*.json"))) - 1
    assert all(store.finished(name) is None for name in planted)


def values(store):
    return {record["task"]: record["value"] for record in store.read_all().records.values()}


ODD = {
    "link.json": lambda path: path.symlink_to("nowhere"),
    "endless.json": lambda path: path.symlink_to("/dev/zero"),
    "folder.json": lambda path: path.mkdir(),
    "pipe.json": os.mkfifo,
    "name\udcff.json": lambda path: path.write_text("{}"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_entry_is_reported_and_left_out(tmp_path, name):
    store = Store(tmp_path)
    store.write(record("good"))
    ODD[name](tmp_path / name)
    for _ in range(2):  # from the files, then from the cache
        contents = store.read_all()
        assert list(contents.records) == [named("good")]
        (problem,) = contents.problems
        assert problem.encode().startswith(f"{tmp_path}/{name[:4]}".encode())
    assert store.finished(name.removesuffix(".json")) is None


def test_who_lost_a_run_writes_no_record_of_it(tmp_path, capsys):
    store = Store(tmp_path)
    with store.lock(named("abc")) as claim:
        claim.path.unlink()
        with pytest.raises(AlreadyRunning, match="was taken over"):
            store.write(record("abc"), claim)
        assert store.end(record("abc"), "interrupted", KeyboardInterrupt(), claim) is None
    assert f"warning: run {named('abc')} was taken over" in capsys.readouterr().err
    assert list(tmp_path.glob("*.json")) == []


def test_a_record_that_cannot_be_written_is_named_with_the_remedy(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("flora.results.record.write_json", full)
    with pytest.raises(CheckpointError, match=r"record .*json cannot be written \(No space left .*: make room"):
        Store(tmp_path).write(record("abc"))


def test_a_changed_added_or_removed_file_is_seen_through_the_cache(tmp_path):
    store = Store(tmp_path)
    store.write(record("a", value=0.5))
    store.write(record("b", value=0.6))
    assert values(store) == {"a": 0.5, "b": 0.6}
    digest = store.read_all().records[named("a")]["sha256"]
    assert digest == hashlib.sha256(store.path(named("a")).read_bytes()).hexdigest()
    store.write(record("a", value=0.75))
    store.write(record("c", value=0.1))  # as if copied from another machine
    store.path(named("b")).unlink()
    assert values(store) == {"a": 0.75, "c": 0.1}
    (tmp_path / ".cache" / "records.parquet").write_bytes(b"damaged")
    assert values(store) == {"a": 0.75, "c": 0.1}


def test_a_cache_with_another_number_in_it_is_not_believed(tmp_path):
    store = Store(tmp_path)
    store.write(record(value=0.5))
    store.read_all()
    cache = tmp_path / ".cache" / "records.parquet"
    table = pq.read_table(cache)
    texts = [text.replace('"value": 0.5', '"value": 0.9') for text in table["summary"].to_pylist()]
    place = table.schema.names.index("summary")
    pq.write_table(table.set_column(place, "summary", [texts]), cache)
    assert store.read_all().records[named("abc")]["value"] == 0.5


def test_a_folder_that_does_not_exist_is_empty():
    assert Store("/nowhere/at/all").read_all().records == {}


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "records").write_text("")
    with pytest.raises(DataError, match="records is not a folder"):
        Store(tmp_path / "records").read_all()


def test_a_finished_record_gives_way_to_another_finished_one_only(tmp_path):
    store = Store(tmp_path)
    store.write(record(value=0.5))
    store.write(record(status="failed"))
    assert store.finished(named("abc"))["value"] == 0.5
    store.write(record(value=0.7))
    assert store.finished(named("abc"))["value"] == 0.7


def test_a_failed_run_is_done_again_on_request_only(tmp_path):
    store = Store(tmp_path)
    failed = record(status="failed")
    failed.error = "RuntimeError('out of memory')"
    store.write(failed)
    with pytest.raises(FailedBefore, match=r"out of memory.*retry=true"):
        store.settled(named("abc"))
    assert store.settled(named("abc"), retry=True) is None
    assert store.settled(named("abc"), force=True) is None
    store.write(record())
    assert store.settled(named("abc"), retry=True)["value"] == 0.5
    assert store.settled(named("abc"), force=True) is None


def test_a_run_that_another_version_of_the_method_finished_is_stale(tmp_path):
    store = Store(tmp_path)
    store.write(record("old"))
    assert store.read_all().state(named("new"), older=[named("old")]) == "stale"
    assert store.read_all().state(named("new")) == "missing"
    store.write(record("new"))
    assert store.read_all().state(named("new"), older=[named("old")]) == "finished"


def test_write_json_is_atomic_when_the_content_cannot_be_written(tmp_path):
    path = tmp_path / "r.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_secrets_of_the_environment_never_reach_a_record(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "db_password"):
        monkeypatch.setenv(name, f"{name}-hunter2")
    monkeypatch.setattr(sys, "argv", ["train.py", "paths.data=https://u:HF_TOKEN-hunter2@host"])
    made = record("abc")
    made.command = command()
    model = {"weights": ["s3://WANDB_API_KEY-hunter2/x"], "MY_SECRET-hunter2": 1}
    made.config = made.config | {"model": made.config["model"] | model}
    made.run_id = recorded_id(made.config)
    made.error = "ValueError('login db_password-hunter2 refused')"
    text = Store(tmp_path).write(made).read_text()
    assert "hunter2" not in text
    content = json.loads(text)
    assert content["command"] == "python train.py paths.data=https://<secret>@host"
    assert content["error"] == "ValueError('login <db_password> refused')"
    assert Store(tmp_path).finished(made.run_id) == content, "though its config does not give its id any more"
    assert not json.loads(Store(tmp_path).write(record("other")).read_text())["masked"]


def test_a_record_from_before_the_lock_file_is_read(tmp_path):
    path = Store(tmp_path).write(record("abc"))
    old = json.loads(path.read_text())
    assert len(old.pop("lock")) == 64
    path.write_text(json.dumps(old))
    assert Store(tmp_path).finished(named("abc")) == old


@pytest.mark.parametrize("metric", ["matthews_correlation", "pearson", "my_reward"])
def test_a_metric_that_may_be_negative_is_believed(tmp_path, metric):
    made = record(value=-0.25)
    made.metric, made.metrics = metric, {metric: -0.25, "loss": 3.5}
    Store(tmp_path).write(made)
    assert Store(tmp_path).finished(made.run_id)["value"] == -0.25


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_what_a_newer_version_wrote_is_neither_read_nor_overwritten(tmp_path, status):
    store = Store(tmp_path)
    path = store.write(record(status=status))
    newer = path.read_text().replace('"schema_version": 2', '"schema_version": 3')
    path.write_text(newer)
    for attempt in (
        lambda claim: store.settled(path.stem),
        lambda claim: store.settled(path.stem, force=True),
        lambda claim: store.write(record()),
        lambda claim: store.end(record(), "failed", RuntimeError(), claim),
    ):
        with (
            store.lock(path.stem) as claim,
            pytest.raises(DataError, match=r"newer flora \(schema version 3.*paths.results=DIR"),
        ):
            attempt(claim)
    assert path.read_text() == newer
    assert store.finished(path.stem) is None


def test_a_record_that_is_not_believed_is_named_once_when_its_run_is_asked_for(tmp_path, capsys):
    store = Store(tmp_path)
    path = store.write(record())
    path.write_text(path.read_text().replace('"value": 0.5', '"value": 0.75'))
    assert store.settled(path.stem) is None
    assert store.settled(path.stem) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {path}: value is 0.75, but its metric accuracy 0.5")


def test_every_shipped_record_gives_its_id_and_agrees_with_itself():
    contents = Store(ROOT / "results" / "measured").read_all()
    assert contents.problems == []
    assert len(contents.records) == len(list((ROOT / "results" / "measured").glob("*.json")))
