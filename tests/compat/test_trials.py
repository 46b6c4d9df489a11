"""Every trial, with FLoRA in each of its forms and with LoRA in the same place, comes out right or as it says."""

import re
import warnings
from dataclasses import asdict

import pytest

from .frame import RIGHT, Trial, every_trial, outcome
from .methods import FACTORED, MERGED, METHODS, Method

# Modules of trials whose networks are so small that every form is tried each time.
OURS = ("passes", "checkpoints", "copies", "transforms")


def marks(trial: Trial, method: Method) -> list[pytest.MarkDecorator]:
    slow = trial.slow or (method in (MERGED, FACTORED) and not trial.name.startswith(OURS))
    return [pytest.mark.compat, *([pytest.mark.slow] if slow else [])]


CASES = [
    pytest.param(trial, method, id=f"{trial.name}-{method.name}", marks=marks(trial, method))
    for trial in every_trial()
    for method in METHODS
    if method.name not in trial.skipped
]


@pytest.mark.parametrize(("trial", "method"), CASES)
def test_comes_out_right(trial: Trial, method: Method, tmp_path, monkeypatch, record_property):
    for module in trial.needs:
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        came_out = outcome(trial, method)
    record_property("compat", {"trial": trial.name, "method": method.name, "outcome": asdict(came_out)})
    expected = trial.expected.get(method.name, trial.expected.get("FLoRA", RIGHT) if method.is_flora else RIGHT)
    if not re.fullmatch(expected, str(came_out)):
        pytest.fail(str(came_out), pytrace=False)
