"""`-m hydra/sweeper=search`: settings by what they score on validation, found again, said as a command line."""

import json
import shlex
import sys
from functools import partial
from pathlib import Path

import pytest

import train
from flora import extras
from flora.errors import ConfigError
from flora.launch.entry import main
from flora.launch.search import validation_value

TINY = (
    *("task=digits", "logger=none", "trainer.device=cpu", "trainer.max_steps=2", "trainer.max_eval_examples=16"),
    *("trainer.batch_size=8", "paths.output=o", "paths.results=r", "hydra.sweeper.trials=3"),
)


@pytest.fixture
def searched(sandbox, script):
    """Run a search in an empty folder: (exit code, stdout, stderr)."""

    def call(*overrides):
        command = ("train.py", "-m", "hydra/sweeper=search", *TINY, *overrides)
        return script(partial(main, train.job, trace=lambda: False), *command)

    return call


def records():
    return {path.stem: json.loads(path.read_text()) for path in Path("r").glob("*.json")}


def test_a_search_tries_settings_finds_them_again_and_says_the_best(searched):
    pytest.importorskip("optuna", reason=extras.needs("this test", "optuna"))
    code, out, err = searched("adapter.r=2")
    assert code == 0, err
    made = records()
    assert len(made) == 3
    assert len({(r["config"]["trainer"]["lr"], r["config"]["adapter"]["scale"]) for r in made.values()}) == 3
    assert {r["config"]["adapter"]["r"] for r in made.values()} == {2}
    assert out.count("record: ") == 3
    *_, said, typed, summary = err.splitlines()
    best = max(made.values(), key=validation_value)
    assert said.startswith(f"best of 3 trials: validation accuracy {validation_value(best):.4f}, run ")
    assert made[said.rpartition("run ")[2].rstrip(":")]["metric"] == "accuracy"
    words = shlex.split(typed)
    assert words[:2] == ["python", "train.py"]
    assert {"adapter.r=2", f"trainer.lr={best['config']['trainer']['lr']:g}"} & set(words)
    assert summary == "sweep: 3 cells: 3 finished, 0 failed, 0 running elsewhere"

    written = {path: path.stat().st_mtime_ns for path in Path("r").glob("*.json")}
    code, _, again = searched("adapter.r=2")
    assert (code, again.count("finished before: ")) == (0, 3)
    assert [line for line in again.splitlines() if line.startswith("search: ")] == [
        line for line in err.splitlines() if line.startswith("search: ")
    ]
    assert {path: path.stat().st_mtime_ns for path in Path("r").glob("*.json")} == written


def test_keys_that_a_method_lacks_are_left_out_and_typed_ranges_replace_the_space(searched):
    pytest.importorskip("optuna", reason=extras.needs("this test", "optuna"))
    code, _, err = searched("adapter=lora", "adapter.r=2,4", "trainer.lr=tag(log,interval(0.001,0.002))")
    assert code == 0, err
    assert "search: adapter.scale is left out, nothing here has it" in err
    for record in records().values():
        assert 0.001 <= record["config"]["trainer"]["lr"] <= 0.002
        assert record["config"]["adapter"]["r"] in (2, 4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=0,1", "search: seed= takes one value"),
        ("hydra.sweeper.trials=0", "hydra.sweeper.trials=0: must be a whole number of at least 1"),
        ("protocol=vtab1k", "search: protocol=vtab1k trains on train and validation together"),
        ("trainer.lr=range(1,3)", "search: trainer.lr=range(1,3): give choices"),
        ("trainer.lr=interval(2,1)", "search: trainer.lr needs choices, or low < high"),
    ],
)
def test_a_search_that_cannot_be_is_one_line(searched, override, message):
    pytest.importorskip("optuna", reason=extras.needs("this test", "optuna"))
    code, _, err = searched(override)
    assert code == 2
    assert err.splitlines()[-1].startswith(f"error: {message}")
    assert not Path("r").exists()


def test_without_optuna_the_error_names_the_command(searched, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, err = searched()
    assert (code, err) == (2, 'error: a search needs optuna, which is not installed: pip install -e ".[search]"\n')


def test_the_validation_metric_and_never_the_test_is_searched_by():
    history = [{"eval_accuracy": 0.5, "step": 1}, {"eval_accuracy": 0.7, "step": 2}, {"eval_accuracy": 0.6, "step": 3}]
    record = {"run_id": "r", "metric": "accuracy", "value": 0.99, "history": history, "selection": {}}
    for select, value in (("best", 0.7), ("last", 0.6)):
        assert validation_value(record | {"config": {"protocol": {"select": select}}}) == value
    values = {"0.1": 0.3, "0.2": 0.4, "0.3": 0.5, "0.4": None}  # the last diverged, the best one in the last fit
    assert validation_value(record | {"selection": {"values": values, "chosen": 0.2}}) == 0.4
    with pytest.raises(ConfigError, match="never looked at validation"):
        validation_value(record | {"history": [], "config": {"protocol": {"select": "best"}}})
