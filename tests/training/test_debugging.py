"""debug=limit, overfit and profile: short runs that say something, and leave no record among the results."""

import json
from functools import partial
from pathlib import Path

import pytest

import train
from flora.config import cell_id, composed
from flora.errors import ConfigError
from flora.launch.entry import main
from flora.training.debugging import watching

DIGITS = ("task=digits", "logger=none", "trainer.device=cpu", "model.image_size=32", "trainer.batch_size=16")


@pytest.fixture
def run(sandbox, script):
    """Run train.py in an empty folder: (record, stderr)."""

    def call(*overrides):
        code, out, err = script(partial(main, train.job, trace=lambda: False), "train.py", *DIGITS, *overrides)
        assert code == 0, err
        return json.loads(Path(out.splitlines()[-1].removeprefix("record: ")).read_text()), err

    return call


def test_a_limited_run_is_short_always_runs_and_lies_apart(run):
    for _ in range(2):
        record, err = run("debug=limit")
        assert "finished before" not in err
    assert [entry["step"] for entry in record["history"] if "loss" in entry] == [1, 2, 3]
    assert record["dtype"] == "fp32"
    assert [path.parent for path in Path().rglob(f"{record['run_id']}.json")] == [Path("outputs/debug/records")]


@pytest.mark.parametrize(
    ("rate", "steps", "verdict"), [("3e-3", 30, "it fell"), ("1e-9", 5, "it did not fall to half")]
)
def test_overfitting_one_batch_says_whether_the_loss_fell(run, rate, steps, verdict):
    record, err = run("debug=overfit", f"trainer.max_steps={steps}", f"trainer.lr={rate}", f"trainer.head_lr={rate}")
    (said,) = [line for line in err.splitlines() if line.startswith("overfit: ")]
    losses = [entry["loss"] for entry in record["history"] if "loss" in entry]
    assert said.startswith(f"overfit: loss {losses[0]:.4f} to {losses[-1]:.4f} in {steps} steps: {verdict}")
    assert (losses[-1] < losses[0] / 2) == (verdict == "it fell")


def test_a_profile_is_a_table_and_a_trace(run):
    record, err = run("debug=profile")
    assert "Self CPU" in err
    (path,) = Path("outputs/debug").glob("*/trace.json")
    assert path.parent.name == record["run_id"]
    names = {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}
    assert len([name for name in names if name.startswith("ProfilerStep#")]) == 5


def test_presets_win_over_an_experiment_and_have_ids_of_their_own():
    for preset in ("limit", "overfit", "profile"):
        shortened = composed(["experiment=vtab_convnext", f"debug={preset}"])
        assert shortened.trainer.max_steps <= 100
        assert (shortened.force, shortened.debug.trace) == (True, False)
        assert cell_id(shortened) != cell_id(composed(["experiment=vtab_convnext"]))
    assert composed(["debug=trace"]).debug == {"trace": True, "watch": None}
    assert cell_id(composed(["debug=trace"])) == cell_id(composed([]))


def test_nothing_else_can_be_watched(tmp_path):
    with pytest.raises(ConfigError, match=r"debug\.watch must be overfit, profile or null, got 'loss'"):
        watching("loss", tmp_path)
