"""Texts of records and configs in tables and figures: shown as they are, and never more than text."""

import csv
import dataclasses
import io
import re

import pytest
import yaml

from flora.results import Store, escape
from flora.results.benchmarks import as_csv as benchmarks_csv
from flora.results.cells import Table, load
from flora.results.markdown import markdown_table
from flora.results.plots import plots
from flora.results.report import document
from flora.results.rows import rows
from flora.results.tables import as_csv, latex, markdown
from flora.training.model_card import write_card
from tests.results.records import write
from tests.results.test_store import record

EVIL = "a|b\n# c `d` *e* [f](g) <h> $i$ _j_ \\k & &lt; ~~l~~ 100 % x_y {m} ^n ~o"
SHOWN = escape.one_line(EVIL)


@pytest.fixture
def evil(tmp_path):
    """The lines of a table whose names are hostile, each with a record."""
    table, store = load("eurosat"), Store(tmp_path / "records")
    for cell in table.cells:
        write(store, cell, 0.9, metric=EVIL, metrics={EVIL: 0.9}, device=EVIL)
    contents = store.read_all()
    assert len(contents.records) == len(table.cells)
    every = rows(table, contents)
    words = {"task": EVIL, "protocol": EVIL, "note": EVIL}
    return [dataclasses.replace(row, model=f"={row.model}", method=f"{EVIL} {row.method}", **words) for row in every]


TABLE = Table("t", "mini", {"title": EVIL, "notes": [EVIL]}, [])


def test_markdown_shows_a_text_as_it_is():
    text = escape.markdown(EVIL)
    assert "\n" not in text
    assert escape.plain(text) == SHOWN
    assert escape.markdown(text) == text, "escaped once"
    bare = re.sub(r"\\.", "", text)
    assert not re.search(r"[|`*\[\]<$\\]|~~|\b_|_\b|&lt;", bare)
    assert escape.markdown("lora_flat, lr=0.1 ~ 1") == "lora_flat, lr=0.1 ~ 1"


def test_a_markdown_table_keeps_its_cells(evil):
    lines = markdown(TABLE, evil).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(evil)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {13}
    read = document("\n".join(lines))
    assert read.title == SHOWN
    ((_, cells),) = [block for block in read.blocks if block[0] == "table"]
    assert cells[2][0] == SHOWN
    assert all(len(row) == 12 for row in cells)
    notes = [line for kind, lines in read.blocks if kind == "list" for line in lines]
    assert notes[:2] == [SHOWN, f"¹ {SHOWN}"]
    assert markdown_table(["a"], [["x | y"]])[-1] == r"| x \| y |"


def test_latex_has_no_command_of_a_text(evil):
    text = latex(TABLE, evil)
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(body) == 1 + len(evil)
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {11}
    known = r"\\(?:textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar)\{\}|\\[&%$#_{}]"
    for line in body:
        left = re.sub(rf"{known}|\\textbf\{{|\$\\pm\$|\$\^\{{1\}}\$|\\\\$", "", line)
        assert not re.search(r"[\\%$#_~^<>|]", left), left
    comments = [line for line in text.splitlines() if line.startswith("% ")]
    assert not any("\n" in line or line.startswith("#") for line in comments)
    assert len(text.splitlines()) == len(body) + len(comments) + text.count(r"\midrule") + 8


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-x", "@SUM(A1)", " =1", "\t=1"])
def test_a_spreadsheet_takes_no_cell_for_a_formula(cell):
    assert escape.spreadsheet(cell) == f"'{cell}"


def test_numbers_and_other_texts_stay_in_a_spreadsheet():
    assert [escape.spreadsheet(cell) for cell in (-0.5, 3, None, "a-b", "1e-3")] == [-0.5, 3, "", "a-b", "1e-3"]


def test_tables_as_csv_hold_no_formula(evil):
    for text in (as_csv(evil), benchmarks_csv([{"file": "=1", "rows": [{"method": "@x", "error": "-y"}]}])):
        _, *lines = csv.reader(io.StringIO(text))
        assert any(cell.startswith("'") for line in lines for cell in line)
        assert not any(cell.startswith(("=", "+", "@", "-")) for line in lines for cell in line)


def test_figures_show_dollars_and_stay_in_their_folder(evil, tmp_path):
    odd = [dataclasses.replace(row, task="../../$\\frac{", model=f"/{row.model}$x$") for row in evil]
    table = load("eurosat")
    made = list(plots(table, odd, lambda run_id: {"history": []}))
    assert made
    assert {len((tmp_path / plot.name).relative_to(tmp_path).parts) for plot in made} == {1}
    made[0].write(tmp_path / "out" / made[0].name)
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_a_table_outside_experiments_is_none(tmp_path):
    from flora.errors import ConfigError

    with pytest.raises(ConfigError, match="no table"):
        load("../experiments/eurosat")


def test_a_model_card_holds_names_as_text(tmp_path):
    made = record("abc")
    made.dataset, made.model, made.command = 'x]\nlicense: mit\n---\n# "y', "m'\n```\nimport os", "a`b`c"
    made.adapter_path = 'p"\n'
    facts = {"num_classes": 2, "class_names": [EVIL, "a\nb"], "weights": {"path": EVIL}}
    facts["inputs"] = {"texts": [EVIL, "'"]}
    write_card(made, facts, tmp_path)
    text = (tmp_path / "README.md").read_text()
    _, head, _ = text.split("---\n", 2)
    assert yaml.safe_load(head)["tags"] == [made.adapter, made.model, made.dataset]
    assert "license" not in yaml.safe_load(head)
    code = text.split("```python\n")[1].split("\n```")[0]
    compile(code, "card", "exec")
    assert text.count("\n```") == 2
