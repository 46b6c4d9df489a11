"""Tables that choose: values of validation, means over data sets and models, differences, steps; by hand."""

import re

import pytest

from flora.errors import ConfigError
from flora.results import Store, cells
from flora.results.cells import load
from flora.results.rows import rows
from flora.results.tables import as_csv, markdown
from tests.results.records import write

TABLE = """
title: T
scales:
  mini:
    split: validation
    against: [lora]
    common: [task=vtab, protocol=holdout, protocol.select=last]
    parts:
      - label: ""
        common: ["protocol.lr_grid=[5e-4,2e-3]"]
        grid: &lora
          task.dataset: [cifar10, dtd10]
          model: [convnext, efficientnet_lite0]
          adapter: [lora]
          seed: [0, 1]
      - label: zero core
        common: [adapter.init=orthogonal, trainer.lr=3e-3, "protocol.lr_grid=[1e-3,3e-3]"]
        grid: {<<: *lora, adapter: [flora]}
"""
BLOCKS = [(task, model) for task in ("cifar10", "dtd10") for model in ("convnext", "efficientnet_lite0")]
# Validation by seed at the two rates of each method; the higher one is chosen.
LORA = {0: (0.60, 0.70), 1: (0.62, 0.72)}
FLORA = {0: (0.75, 0.71), 1: (0.73, 0.74)}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """TABLE, or what replaces some of its text."""
    (tmp_path / "experiments").mkdir()
    monkeypatch.setattr(cells, "ROOT", tmp_path)

    def make(*replaced):
        text = TABLE
        for old, new in replaced:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "experiments" / "t.yaml").write_text(text)
        return load("t")

    return make


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "records")


def run(store, cell, values, curve=(), **changes):
    """A record with the values at its rates, the looks of its fit, and a test value that no such table may show."""
    rates = ("0.0005", "0.002") if cell.method == "lora" else ("0.001", "0.003")
    chosen = max(rates, key=lambda rate: values[rates.index(rate)] or 0)
    selection = {"split": "validation", "metric": "accuracy", "values": dict(zip(rates, values, strict=True))}
    history = [{"step": step, "eval_accuracy": value} for step, value in curve]
    selection |= {"chosen": float(chosen), "seconds": 1.0}
    write(store, cell, 0.1234, lr=float(chosen), selection=selection, history=history, **changes)


def fill(store, table, but=()):
    """All records, FLoRA's higher by 0.01 on the second network."""
    for cell in (cell for cell in table.cells if cell not in but):
        values = (LORA if cell.method == "lora" else FLORA)[cell.seed]
        more = 0.01 if cell.model == "efficientnet_lite0" and cell.method == "flora" else 0
        looks = [(10, 0.5), (20, 0.71 if cell.method == "flora" and cell.seed == 0 else 0.6), (30, max(values))]
        run(store, cell, [value + more for value in values], looks)


def lines(table, store):
    """Cells of the lines of both tables: of the rows, and of the means."""
    text = markdown(table, rows(table, store.read_all()))
    found = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    heads = [number for number, line in enumerate(found) if line[0] in ("task", "method")]
    parts = [found[start:end] for start, end in zip(heads, [*heads[1:], None], strict=True)]
    return text, *([dict(zip(part[0], line, strict=True)) for line in part[2:]] for part in parts[:2])  # not the tests


def test_a_table_of_validation_shows_the_value_of_the_chosen_rate_and_never_the_test(table, store):
    made = table()
    fill(store, made)
    text, of_rows, _ = lines(made, store)
    assert "0.1234" not in text + as_csv(rows(made, store.read_all()))
    first = next(line for line in of_rows if line["method"] == "flora (zero core)")
    assert (first["task"], first["metric"]) == ("cifar10", "validation accuracy")
    # 0.75 and 0.74: mean 0.745, deviation 0.01 / sqrt(2)
    assert first["ours"].replace("*", "") == "0.7450 ± 0.0071 (n = 2)"
    assert "no test split was looked at" in text
    assert "development sets" not in text, "which is said where test values are shown"


def test_steps_count_to_the_first_look_with_the_mean_final_value_of_lora(table, store):
    made = table()
    fill(store, made)
    _, of_rows, of_means = lines(made, store)
    shown = {line["method"]: line["steps to LoRA"] for line in of_rows if line["task"] == "cifar10"}
    # LoRA ends at 0.70 and 0.72, so 0.71 is to be reached: FLoRA does after 20 and 30 steps, LoRA with one of its seeds
    assert shown == {"flora (zero core)": "25", "lora": "30 (1 of 2)"}
    chosen = {line["method"]: (line["reach LoRA"], line["steps"]) for line in of_means if line["rate"] == "chosen"}
    assert chosen == {"flora (zero core)": ("8 of 8", "25"), "lora": ("4 of 8", "-")}, "half of them never arrive"


def test_means_at_each_rate_and_at_chosen_ones_with_their_standard_errors(table, store):
    made = table()
    fill(store, made)
    text, _, of_means = lines(made, store)
    found = {(line["method"], line["rate"]): line for line in of_means}
    assert list(found) == [
        *(("lora", rate) for rate in ("0.0005", "0.002 (default)", "chosen")),
        *(("flora (zero core)", rate) for rate in ("0.001", "0.003 (default)", "chosen")),
    ]
    # seeds 0.75 and 0.73 deviate by 0.02 / sqrt(2), a variance of 0.0002, whose half is 0.0001 in each of two blocks
    # of a network: root of 0.0002 / 2 = 0.0071, and of 0.0004 / 4 = 0.0050 over all four
    low = found["flora (zero core)", "0.001"]
    assert (low["convnext"], low["efficientnet_lite0"]) == ("0.7400 ± 0.0071", "0.7500 ± 0.0071")
    assert low["mean over 4"] == "0.7450 ± 0.0050"
    # chosen less chosen, by seed: 0.75 - 0.70 = 0.05 and 0.74 - 0.72 = 0.02, with 0.01 more on the second network:
    # 0.05 0.02 0.06 0.03, twice; mean 0.04, deviation sqrt(2 x 2 x (0.01² + 0.02²) / 7) = 0.016903, / sqrt(8)
    assert found["flora (zero core)", "chosen"]["to lora"] == "+0.0400 ± 0.0060"
    # at one rate, less LoRA at its own default rate: 0.71 - 0.70, 0.74 - 0.72: mean 0.015 + 0.005
    assert found["flora (zero core)", "0.003 (default)"]["to lora"].startswith("+0.0200 ± ")
    assert found["lora", "0.0005"]["to lora"] == "-0.1000 ± 0.0000"
    assert found["lora", "0.002 (default)"]["to lora"] == found["lora", "chosen"]["to lora"] == "-"
    assert "paired by data set, model and seed" in text


def test_what_is_missing_is_a_dash_and_a_difference_says_of_how_many_runs_it_is(table, store):
    made = table()
    gone = next(cell for cell in made.cells if (cell.method, cell.model) == ("flora", "efficientnet_lite0"))
    fill(store, made, but=[gone])
    _, of_rows, of_means = lines(made, store)
    chosen = next(line for line in of_means if (line["method"], line["rate"]) == ("flora (zero core)", "chosen"))
    assert (chosen["convnext"], chosen["efficientnet_lite0"], chosen["mean over 4"]) == ("0.7450 ± 0.0035", "-", "-")
    assert chosen["to lora"].endswith("(n = 7)")
    store.path(made.cells[0].cell_id).unlink()
    _, of_rows, _ = lines(made, store)
    block = [line for line in of_rows if (line["task"], line["model"]) == ("cifar10", "convnext")]
    assert [line["steps to LoRA"] for line in block] == ["-", "-"], "LoRA has one seed of two"
    for path in store.folder.glob("*.json"):
        path.unlink()
    assert "mean over" not in markdown(made, rows(made, store.read_all()))


def test_a_rate_that_was_tried_by_some_runs_alone_has_no_line(table, store):
    made = table()
    fill(store, made)
    cell = made.cells[0]
    values = {"0.0005": 0.6, "0.002": 0.7, "0.008": 0.65}  # a grid that was extended
    selection = {"split": "validation", "metric": "accuracy", "values": values, "chosen": 2e-3, "seconds": 1.0}
    write(store, cell, 0.1234, lr=2e-3, selection=selection, history=[])
    _, _, of_means = lines(made, store)
    assert [line["rate"] for line in of_means if line["method"] == "lora"] == ["0.0005", "0.002 (default)", "chosen"]


def test_a_rate_that_diverged_has_no_mean(table, store, monkeypatch):
    monkeypatch.setattr("flora.results.store.fault", lambda record, run_id: None)  # which may know no such rates yet
    made = table()
    fill(store, made)
    run(store, next(cell for cell in made.cells if cell.method == "flora"), (0.75, None), [(30, 0.75)])
    _, _, of_means = lines(made, store)
    line = next(line for line in of_means if line["rate"] == "0.003 (default)")
    assert line["mean over 4"] == "- (1 diverged)"
    assert line["to lora"].endswith("(n = 7)")


def test_without_a_grid_the_value_is_the_last_look_or_the_best_one_as_the_protocol_says(table, store):
    for select, expected in (("last", "0.6000"), ("best", "0.7000")):
        made = table(
            ('common: ["protocol.lr_grid=[5e-4,2e-3]"]', "common: [trainer.lr=2e-3]"),
            ("select=last", f"select={select}"),
        )
        cell = next(cell for cell in made.cells if cell.method == "lora")
        write(store, cell, 0.1234, history=[{"step": 5, "eval_accuracy": 0.7}, {"step": 9, "eval_accuracy": 0.6}])
        _, of_rows, _ = lines(made, store)
        assert next(line for line in of_rows if line["method"] == "lora")["ours"].startswith(expected)
    write(store, cell, 0.1234, history=[{"step": 5, "loss": 0.7}])
    text = markdown(made, rows(made, store.read_all()))
    assert "0.1234" not in text, "a run that never looked at validation has no value of it"


def test_a_table_of_test_values_has_means_without_rates_and_names_development_sets(table, store):
    made = table(("    split: validation\n", ""), ("against: [lora]", 'against: ["flora (zero core)"]'))
    for cell in made.cells:
        write(store, cell, 0.8 if cell.method == "lora" else 0.7 + 0.02 * cell.seed)
    text = markdown(made, rows(made, store.read_all()))
    assert "development sets: cifar10, dtd10; defaults of FLoRA were chosen on validation splits of these" in text
    assert "steps to LoRA" not in text
    assert "rate |" not in text
    # 0.80 less 0.70 and 0.72, four times: mean 0.09, deviation 0.01 sqrt(8 / 7), / sqrt(8)
    assert re.search(r"\| lora \| 0\.8000 ± 0\.0000 \| .* \| \+0\.0900 ± 0\.0038 \|", text)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("split: validation", "split: train", "split must be test or validation, got 'train'"),
        ("against: [lora]", "against: lora", "against must be a list of names of rows"),
        ("against: [lora]", "against: [dora]", r"no row is called 'dora': choose of flora \(zero core\), lora"),
        ("label: zero core", "label: 3", "label must be a text, got 3"),
        ("label: zero core", "label: [a]", "label must be a text"),
    ],
)
def test_what_a_file_says_wrong_is_named(table, old, new, said):
    with pytest.raises(ConfigError, match=said):
        table((old, new))


def test_two_parts_of_one_label_that_would_share_a_row_are_refused(table):
    again = "      - {label: zero core, common: [trainer.epochs=3], grid: {<<: *lora, adapter: [flora]}}\n"
    made = table(
        ("        grid: {<<: *lora, adapter: [flora]}\n", f"        grid: {{<<: *lora, adapter: [flora]}}\n{again}")
    )
    assert {row[3] for row in made.rows} == {
        "",
        "zero core, init=orthogonal, lr=3e-3, lr_grid=[1e-3,3e-3]",
        "zero core, epochs=3",
    }


TABLES = ("defaults", "starts", "text_defaults")


@pytest.mark.parametrize("name", TABLES)
def test_tables_that_choose_have_the_default_rate_in_their_grids_and_train_on_train_alone(name):
    made = load(name)
    assert made.split == "validation"
    kinds = {(cell.method, cell.label, cell.task): cell for cell in made.cells}
    for cell in kinds.values():
        cfg = cells.config.composed(cell.overrides)
        assert cfg.protocol.final_train == "train"
        assert cfg.protocol.select == "last"
        assert cfg.trainer.lr in cfg.protocol.lr_grid
        if cell.method == "flora":  # named, so that the run stays the same when a default changes
            assert {"adapter.init", "adapter.scale", "adapter.r"} <= cell.settings.keys()
