"""Render docs/compatibility.md from the outcomes of tests/compat: `python scripts/make_compatibility.py [--check]`.

The outcomes: python -m pytest tests/compat --outcomes results/compatibility.json
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import flora.launch.installed  # noqa: F401

from flora.files import ROOT
from flora.launch.entry import main
from flora.results.markdown import DASH, markdown_table

OUTCOMES, PAGE = ROOT / "results" / "compatibility.json", ROOT / "docs" / "compatibility.md"
HEAD = """# Other people's libraries

Each row is a trial of `tests/compat`: something done in a library with an adapter, run with `FloraConfig` and with
PEFT's `LoraConfig` in the same place. Networks are small and random. Their losses, gradients or outputs are compared
with those of a network written by hand, whose weights are W + delta, layer by layer. FLoRA runs in each of its forms,
`auto`, `merged` and `factored`; where they differ, the row says so.

`right`: everything agrees within rounding. `wrong`: a number differs. `fails`: an error that is not meant for the user.
`refused`: one line that says what to do. `{dash}`: the method has no such thing. FLoRA is right in {flora} of {all}
rows, LoRA in {lora} of the {asked} that it can be asked.

Tried on {date} with {versions}. `pip install -e ".[dev,compat]"` installs the libraries, and
`python -m pytest tests/compat --outcomes results/compatibility.json` tries again. Then
`scripts/make_compatibility.py` renders this page.

<!-- rendered by scripts/make_compatibility.py -->
"""


def rendered(outcomes: dict[str, Any]) -> str:
    """The page.

    Args:
        outcomes: ``date``, ``versions`` and ``rows``, as tests/compat/conftest.py writes them.
    """
    cells = [(row, _flora(row["outcomes"]), _said(row["outcomes"].get("LoRA"))) for row in outcomes["rows"]]
    ordered = sorted(cells, key=lambda cell: cell[0]["library"].lower())  # within one, as they were tried
    table = [[row["library"], row["version"], row["what"], flora, lora] for row, flora, lora in ordered]
    text = HEAD.format(
        dash=DASH,
        all=len(cells),
        flora=sum(flora == "right" for _, flora, _ in cells),
        lora=sum(lora == "right" for *_, lora in cells),
        asked=sum(lora != DASH for *_, lora in cells),
        date=outcomes["date"],
        versions=", ".join(f"{name} {version}" for name, version in outcomes["versions"].items()),
    )
    lines = markdown_table(["library", "version", "what", "FLoRA", "LoRA"], table)
    return text + "\n".join(lines) + "\n"


def _flora(outcomes: dict[str, Any]) -> str:
    """FLoRA's outcome: one for all forms where they agree."""
    found = {name.partition(", ")[2] or "auto": o for name, o in outcomes.items() if name.startswith("FLoRA")}
    if not found:
        return DASH
    forms = {form: _said(outcome) for form, outcome in found.items()}
    if len({outcome["status"] for outcome in found.values()}) == 1:  # of lines that differ, the first
        return forms["auto"]
    return "; ".join(f"{form}: {said}" for form, said in forms.items())


def _said(outcome: dict[str, str] | None) -> str:
    if outcome is None:
        return DASH
    return f"{outcome['status']}: {outcome['line']}" if outcome["line"] else outcome["status"]


def make_compatibility() -> None:
    """Write the page, or with --check exit with code 1 where it is stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when the page is stale")
    check = parser.parse_args().check
    text = rendered(json.loads(Path(OUTCOMES).read_text()))
    if not check:
        PAGE.write_text(text)
        print(PAGE.relative_to(ROOT))
    elif text != PAGE.read_text():
        print("error: docs/compatibility.md is stale: run scripts/make_compatibility.py", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main(make_compatibility, trace=lambda: False)
