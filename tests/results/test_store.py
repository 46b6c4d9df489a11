"""Records: written whole or not at all, found again by run id, never silently averaged when broken."""

import errno
import hashlib
import json
import os
import sys

import pytest

from flora.errors import AlreadyRunning, CheckpointError, DataError, FailedBefore
from flora.files import write_json
from flora.results import Record, Store
from flora.results.record import command


def record(run_id="abc", seed=0, value=0.5, status="finished", adapter="flora"):
    made = Record(
        run_id=run_id,
        method_version=1,
        task="vtab",
        dataset="eurosat",
        model="convnext",
        adapter=adapter,
        protocol="vtab1k",
        mode="train",
        seed=seed,
        config={},
        command="python train.py",
        dtype="fp32",
        device="cpu",
        started="2026-01-01T00:00:00+00:00",
    )
    made.status, made.metric, made.value = status, "accuracy", value
    made.lr, made.trainable_params, made.head_params, made.total_params = 1e-3, 50, 10, 1000
    made.finished = "2026-01-01T00:01:40+00:00"
    made.train_seconds, made.examples_per_second, made.peak_memory_bytes = 2.0, 100.0, 10**6
    return made


def test_a_written_record_is_found_by_its_run_id(tmp_path):
    store = Store(tmp_path)
    path = store.write(record("abc"))
    assert path == tmp_path / "abc.json"
    assert store.finished("abc")["value"] == 0.5
    assert store.finished("other") is None


@pytest.mark.parametrize("status", ["failed", "interrupted", "running"])
def test_only_finished_records_count_as_finished(tmp_path, status):
    Store(tmp_path).write(record(status=status))
    assert Store(tmp_path).finished("abc") is None


def test_a_record_with_nan_is_refused_and_the_old_file_stays(tmp_path):
    store = Store(tmp_path)
    store.write(record(value=0.5))
    with pytest.raises(ValueError, match="JSON"):
        store.write(record(value=float("nan")))
    assert store.finished("abc")["value"] == 0.5
    assert sorted(os.listdir(tmp_path)) == ["abc.json"]  # no temporary file is left


def test_broken_records_are_reported_and_left_out(tmp_path):
    store = Store(tmp_path)
    good = store.write(record("good"))
    content = json.loads(good.read_text())

    def plant(name, **changes):
        (tmp_path / f"{name}.json").write_text(json.dumps(content | {"run_id": name} | changes))

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
    plant("copy", run_id="good")  # the same run twice would count twice in a mean
    planted = {path.stem for path in tmp_path.glob("*.json")} - {"good"}
    for _ in range(2):  # from the files, then from the cache
        contents = store.read_all()
        assert list(contents.records) == ["good"]
        assert {problem.split(".json")[0].rpartition("/")[2] for problem in contents.problems} == planted
        assert all(len(problem.splitlines()) == 1 for problem in contents.problems)
    assert all(store.finished(name) is None for name in planted)


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
        assert list(contents.records) == ["good"]
        (problem,) = contents.problems
        assert problem.encode().startswith(f"{tmp_path}/{name[:4]}".encode())
    assert store.finished(name.removesuffix(".json")) is None


def test_who_lost_a_run_writes_no_record_of_it(tmp_path, capsys):
    store = Store(tmp_path)
    with store.lock("abc") as claim:
        claim.path.unlink()
        with pytest.raises(AlreadyRunning, match="was taken over"):
            store.write(record("abc"), claim)
        assert store.end(record("abc"), "interrupted", KeyboardInterrupt(), claim) is None
    assert "warning: run abc was taken over" in capsys.readouterr().err
    assert list(tmp_path.glob("*.json")) == []


def test_a_record_that_cannot_be_written_is_named_with_the_remedy(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("flora.results.record.write_json", full)
    with pytest.raises(CheckpointError, match=r"record .*abc.json cannot be written \(No space left .*: make room"):
        Store(tmp_path).write(record("abc"))


def test_a_changed_added_or_removed_file_is_seen_through_the_cache(tmp_path):
    store = Store(tmp_path)
    store.write(record("a", value=0.5))
    store.write(record("b", value=0.6))
    assert {k: r["value"] for k, r in store.read_all().records.items()} == {"a": 0.5, "b": 0.6}
    digest = store.read_all().records["a"]["sha256"]
    assert digest == hashlib.sha256((tmp_path / "a.json").read_bytes()).hexdigest()
    store.write(record("a", value=0.75))
    store.write(record("c", value=0.1))  # as if copied from another machine
    store.path("b").unlink()
    assert {k: r["value"] for k, r in store.read_all().records.items()} == {"a": 0.75, "c": 0.1}
    (tmp_path / ".cache" / "records.parquet").write_bytes(b"damaged")
    assert {k: r["value"] for k, r in store.read_all().records.items()} == {"a": 0.75, "c": 0.1}


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
    assert store.finished("abc")["value"] == 0.5
    store.write(record(value=0.7))
    assert store.finished("abc")["value"] == 0.7


def test_a_failed_run_is_done_again_on_request_only(tmp_path):
    store = Store(tmp_path)
    failed = record(status="failed")
    failed.error = "RuntimeError('out of memory')"
    store.write(failed)
    with pytest.raises(FailedBefore, match=r"out of memory.*retry=true"):
        store.settled("abc")
    assert store.settled("abc", retry=True) is None
    assert store.settled("abc", force=True) is None
    store.write(record())
    assert store.settled("abc", retry=True)["value"] == 0.5
    assert store.settled("abc", force=True) is None


def test_a_run_that_another_version_of_the_method_finished_is_stale(tmp_path):
    store = Store(tmp_path)
    store.write(record("old"))
    assert store.read_all().state("new", older=["old"]) == "stale"
    assert store.read_all().state("new") == "missing"
    store.write(record("new"))
    assert store.read_all().state("new", older=["old"]) == "finished"


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
    made.config = {"model": {"weights": ["s3://WANDB_API_KEY-hunter2/x"], "MY_SECRET-hunter2": 1}}
    made.error = "ValueError('login db_password-hunter2 refused')"
    text = Store(tmp_path).write(made).read_text()
    assert "hunter2" not in text
    content = json.loads(text)
    assert content["command"] == "python train.py paths.data=https://u:<HF_TOKEN>@host"
    assert content["error"] == "ValueError('login <db_password> refused')"


def test_a_record_from_before_the_lock_file_is_read(tmp_path):
    path = Store(tmp_path).write(record("abc"))
    old = json.loads(path.read_text())
    assert len(old.pop("lock")) == 64
    path.write_text(json.dumps(old))
    assert Store(tmp_path).finished("abc") == old
