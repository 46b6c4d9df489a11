"""The option that writes down how the trials came out, for scripts/make_compatibility.py."""

import json
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from flora.files import write_json

from .frame import every_trial

OUTCOMES = {}  # by trial, by method: status and line


def pytest_addoption(parser):
    parser.addoption("--outcomes", type=Path, help="JSON file to write the outcomes of the compatibility trials to")


def pytest_runtest_logreport(report):
    """Collect outcomes in the process that reports, whichever ran the test."""
    for key, value in report.user_properties:
        if key == "compat" and report.when == "call":
            OUTCOMES.setdefault(value["trial"], {})[value["method"]] = value["outcome"]


def pytest_sessionfinish(session):
    file = session.config.getoption("--outcomes", None)
    if file is None or not OUTCOMES:
        return
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    before = json.loads(file.read_text()) if file.exists() else {"versions": None}
    # Trials that were not run now keep their rows, as long as it is with the same libraries.
    kept = {row["trial"]: row for row in before["rows"]} if before["versions"] == versions else {}
    rows = [
        {"trial": t.name, "library": t.library, "version": version(t.library), "what": t.what}
        | {"outcomes": kept.get(t.name, {}).get("outcomes", {}) | OUTCOMES.get(t.name, {})}
        for t in every_trial()
        if t.name in OUTCOMES or t.name in kept
    ]
    write_json(file, {"date": datetime.now(UTC).date().isoformat(), "versions": versions, "rows": rows})
