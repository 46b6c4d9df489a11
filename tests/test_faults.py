"""What a user sees of a fault and what is kept of the run: each row of docs/faults.md is a run of train.py here."""

import re

import pytest

from tests.faults import inputs, processes, storage  # noqa: F401 they register their faults
from tests.faults.frame import FAULTS, SLOW, TABLE, Place


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in FAULTS]
)
def test_a_fault_shows_and_keeps_what_the_table_says(name, tmp_path, monkeypatch, capsys):
    row, place = TABLE[name], Place(tmp_path, monkeypatch, capsys)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (code, err), mend = FAULTS[name](place)
    assert code == row.code, err
    assert "Traceback" not in err
    pattern = ".*".join(re.escape(part) for part in row.see.split("…"))
    assert any(re.fullmatch(pattern, line) for line in err.splitlines()), err
    statuses = {record["status"] for record in place.records()} or {"none"}
    assert statuses == {row.record}
    files = {
        "adapter": list(place.outputs.glob("*/adapter/*.safetensors")),
        "checkpoint": place.checkpoints(),
    }
    kept = " ".join(kind for kind, paths in files.items() if paths) or "nothing"
    assert kept == row.kept
    assert not list(tmp_path.rglob("*.tmp")), "nothing half-written"
    if mend is not None:
        options = mend() or (["adapter=full"] if "limit" in name else [])
        code, err = place.run(*options)
        assert code == 0, err
        trained_anew = "finished before" not in err and "going on from checkpoint" not in err
        assert trained_anew == (row.kept == "nothing")


def test_the_table_and_the_tests_have_the_same_faults():
    assert {*FAULTS} == {*TABLE}
