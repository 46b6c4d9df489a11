"""One training, tested on several sets: a row for each, of its own metric."""

import pytest

from flora.errors import ConfigError
from flora.results import Store
from flora.results.cells import load
from flora.results.rows import rows
from tests.results.records import write
from tests.results.test_cells import table_of

EIGHT = ["boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_e", "arc_c", "obqa"]


def test_the_paper_trains_each_commonsense_model_once_for_eight_sets():
    table = load("commonsense", "paper")
    # four methods at two groups of LLaMA-7B, three and two on LLaMA3-8B; and what nobody trained
    trained = [cell for cell in table.cells if cell.settings.get("trainer.max_steps") != "0"]
    assert len(trained) >= 4 + 4 + 3 + 2
    assert len({(cell.model, cell.method, cell.settings["adapter.r"]) for cell in trained}) == len(trained)
    assert {cell.settings["task.dataset"] for cell in table.cells} == {"all"}
    assert {cell.tests for cell in table.cells} == {tuple(EIGHT)}
    assert len(table.rows) == 8 * len(table.cells)


def test_each_set_has_the_value_of_its_metric_and_the_published_number_beside_it(tmp_path):
    store, table = Store(tmp_path), load("commonsense", "paper")
    cell = next(c for c in table.cells if c.method == "lora" and c.published == "LLaMA-7B r32")
    values = {name: 0.1 * number for number, name in enumerate(EIGHT, 1)}
    scores = {"accuracy": 0.45} | {f"{name}_accuracy": value for name, value in values.items()}
    write(store, cell, 0.45, metrics=scores)
    found = {row.task: row for row in rows(table, store.read_all()) if row.records}
    assert {name: row.values for name, row in found.items()} == {name: [value] for name, value in values.items()}
    # LLM-Adapters' LoRA of LLaMA-7B at r = 32
    assert found["boolq"].published.value == pytest.approx(0.689)
    assert table.labels[cell].startswith("all llama_7b lora")


def test_a_run_that_left_a_set_out_has_no_row_for_it(tmp_path):
    store, table = Store(tmp_path), load("commonsense", "paper")
    cell = next(c for c in table.cells if c.method == "lora" and c.published)
    write(store, cell, 0.5, metrics={"accuracy": 0.5, "boolq_accuracy": 0.5})
    assert [row.task for row in rows(table, store.read_all()) if row.records] == ["boolq"]


def test_tests_must_be_a_list(tmp_path, monkeypatch):
    table_of(tmp_path, monkeypatch, "title: T\nscales: {mini: {tests: boolq, grid: {adapter: [lora]}}}")
    with pytest.raises(ConfigError, match="tests must be a list of data sets"):
        load("t")


def test_the_mini_table_shows_what_is_reached_without_training():
    untrained = [cell for cell in load("commonsense").cells if cell.settings.get("trainer.max_steps") == "0"]
    assert [cell.settings.get("task.answers") for cell in untrained] == ["majority", None]
    assert len({cell.cell_id for cell in untrained}) == 2
