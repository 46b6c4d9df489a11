"""Records: written whole or not at all, found again by run id, never silently averaged when broken."""

import json
import os

import pytest

from flora.results import Record, Store
from flora.results.record import write_json
from flora.results.tables import grouped, markdown, mean_std


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
    made.lr, made.trainable_params, made.total_params = 1e-3, 50, 1000
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
    (tmp_path / "truncated.json").write_text(good.read_text()[:100])
    (tmp_path / "schema.json").write_text(json.dumps(content | {"schema_version": 99}))
    (tmp_path / "nan.json").write_text(json.dumps(content | {"value": float("nan")}))
    (tmp_path / "status.json").write_text(json.dumps(content | {"status": "done"}))
    (tmp_path / "list.json").write_text("[1]")
    records, problems = store.read_all()
    assert [r["run_id"] for r in records] == ["good"]
    assert len(problems) == 5
    assert all(name in " ".join(problems) for name in ("truncated", "schema", "nan", "status", "list"))


def test_write_json_is_atomic_when_the_content_cannot_be_written(tmp_path):
    path = tmp_path / "r.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_tables_show_mean_and_sample_deviation_over_seeds():
    # 0.4, 0.5, 0.9: mean 0.6; squared deviations 0.04 + 0.01 + 0.09 = 0.14; / 2 = 0.07; root 0.2646
    records = [vars(record(str(s), s, v)) for s, v in enumerate((0.4, 0.5, 0.9))]
    assert mean_std([0.4, 0.5, 0.9]) == pytest.approx((0.6, 0.07**0.5))
    text = markdown("Title", records)
    assert "accuracy 0.6000 ± 0.2646" in text
    assert "| 3 |" in text
    assert "| 5.00 |" in text  # 50 of 1000 parameters, in percent
    assert len(grouped(records)) == 1


def test_a_single_seed_has_no_deviation():
    assert mean_std([0.4]) == (0.4, None)
    assert "±" not in markdown("Title", [vars(record())])
