"""What a run is chosen by, and a run of which nothing is trained."""

import json
from functools import partial
from pathlib import Path

import pytest

import train
from flora.launch.entry import main


@pytest.fixture
def run(sandbox, script):
    """Run train.py on the digits in this process: (exit code, its record, stderr)."""

    def call(*overrides):
        quick = ["task=digits", "logger=none", "trainer.batch_size=8", "trainer.max_eval_examples=16"]
        words = [*quick, "trainer.device=cpu", "model.image_size=32", *overrides]
        code, out, err = script(partial(main, train.job, trace=lambda: False), "train.py", *words)
        return code, json.loads(Path(out.splitlines()[-1].removeprefix("record: ")).read_text()), err

    return call


def test_what_is_tested_before_its_first_step_is_a_run_of_its_own(run):
    untrained = run("trainer.max_steps=0")[1]
    trained = run("trainer.max_steps=2")[1]
    assert untrained["status"] == "finished"
    assert (untrained["lr"], untrained["history"], untrained["train_seconds"]) == (None, [], None)
    assert untrained["run_id"] != trained["run_id"]
    assert untrained["config"]["trainer"]["max_steps"] == 0
    code, again, err = run("trainer.max_steps=0")
    assert (code, again["run_id"]) == (0, untrained["run_id"])
    assert "finished before" in err


def test_the_rate_of_the_least_validation_loss_is_chosen(run):
    code, record, err = run("protocol=llm_adapters", "protocol.lr_grid=[1e-4,1e-2]", "trainer.max_steps=20")
    assert code == 0, err
    selection = record["selection"]
    assert selection["metric"] == "loss"
    assert selection["values"]["0.0001"] != selection["values"]["0.01"]
    assert selection["chosen"] == float(min(selection["values"], key=selection["values"].get))
