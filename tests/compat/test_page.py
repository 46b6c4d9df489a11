"""docs/compatibility.md has one row for every trial and no other, and says what came out."""

import json
import sys
from pathlib import Path

import pytest

from .frame import every_trial
from .methods import METHODS

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import make_compatibility

ROOT = Path(__file__).parents[2]
OUTCOMES = json.loads((ROOT / "results" / "compatibility.json").read_text())


def test_each_trial_has_its_row_and_there_is_no_other():
    rows = [(row["trial"], row["library"], row["what"]) for row in OUTCOMES["rows"]]
    assert rows == [(trial.name, trial.library, trial.what) for trial in every_trial()]


def test_names_and_rows_are_unique():
    assert len({trial.name for trial in every_trial()}) == len(every_trial())
    assert len({(trial.library, trial.what) for trial in every_trial()}) == len(every_trial())


@pytest.mark.parametrize(
    ("row", "trial"), list(zip(OUTCOMES["rows"], every_trial(), strict=False)), ids=lambda x: getattr(x, "name", "")
)
def test_each_method_that_can_be_asked_has_an_outcome(row, trial):
    assert set(row["outcomes"]) == {method.name for method in METHODS} - set(trial.skipped)


def test_the_page_is_rendered_from_the_outcomes():
    assert (ROOT / "docs" / "compatibility.md").read_text() == make_compatibility.rendered(OUTCOMES)


def test_nothing_that_went_wrong_is_left_out():
    page = make_compatibility.rendered(OUTCOMES)
    bad = [o for row in OUTCOMES["rows"] for o in row["outcomes"].values() if o["status"] != "right"]
    assert page.count("wrong: ") + page.count("fails: ") + page.count("refused: ") >= len({o["line"] for o in bad})


def test_an_outcome_of_one_form_is_shown():
    right, wrong = {"status": "right", "line": ""}, {"status": "wrong", "line": "off by 2"}
    row = {"trial": "t", "library": "torch", "version": "1", "what": "a*b", "outcomes": {
        "FLoRA": right, "FLoRA, merged": wrong, "FLoRA, factored": right}}  # fmt: skip
    page = make_compatibility.rendered({"date": "today", "versions": {"torch": "1"}, "rows": [row]})
    assert "| torch | 1 | a\\*b | auto: right; merged: wrong: off by 2; factored: right | - |" in page
