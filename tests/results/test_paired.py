"""Paired tests, rows that validation chooses, sizes and correlations, against scipy and numbers by hand."""

import math
import warnings

import numpy as np
import pytest
import yaml
from scipy import stats

from flora.errors import ConfigError
from flora.results import cells
from flora.results.budget_figure import points
from flora.results.cells import load
from flora.results.markdown import DASH
from flora.results.norms import best_rates, correlations_markdown
from flora.results.paired import paired
from flora.results.reported import as_printed
from flora.results.rows import Row, chosen_rows, rows
from flora.results.store import Store
from flora.results.tables import dashes, markdown
from tests.results.records import write


def row(task, method, settings, values, **shared):
    """A row with a record for each seed; further facts are the same in all."""
    records = {seed: {"value": value, "metric": "accuracy", **shared} for seed, value in enumerate(values)}
    return Row(task, "convnext", method, settings, records, cells=len(values) or 1)


def tuned(method, settings, values, reached):
    """A row whose runs reached values on validation at the rates that they chose."""
    made = row("t", method, settings, values)
    for seed, best in enumerate(reached):
        made.records[seed]["selection"] = {"chosen": 0.002, "values": {"0.002": best, "0.02": 0.9 * best}}
    return made


def test_a_paired_test_is_scipys_over_common_runs():
    drawn = np.random.default_rng(0)
    left, change = drawn.normal(0.8, 0.02, 9), drawn.normal(0.01, 0.01, 9)
    ours = {("a", "m", seed): value for seed, value in enumerate(left)}
    theirs = {("a", "m", seed): value for seed, value in enumerate(left + change)}
    found = paired(ours | {("b", "m", 0): 0.5}, theirs | {("c", "m", 0): 0.1, ("a", "m", 0): None})
    test = stats.ttest_rel(left[1:], (left + change)[1:])
    low, high = test.confidence_interval(0.95)
    assert found.n == 8
    assert (found.mean, found.low, found.high) == pytest.approx((-change[1:].mean(), low, high))
    wilcoxon = stats.wilcoxon(left[1:], (left + change)[1:]).pvalue
    assert (found.t, found.wilcoxon) == pytest.approx((test.pvalue, wilcoxon))
    assert (found.above, found.below) == ((change[1:] < 0).sum(), (change[1:] > 0).sum())


@pytest.mark.parametrize(
    ("right", "change"),
    [
        ([382, 407, 410, 411], [1, -1, 1, 0]),
        ([388, 414, 406, 414], [-4, -4, 4, 3]),
        ([392, 381, 407, 409, 387, 402, 395], [2, 2, -2, 1, 1, -1, 3]),
    ],
)
def test_equal_differences_of_accuracies_are_ties_whatever_their_last_digit(right, change):
    """Of so many right among 500: 383 / 500 - 382 / 500 is another float than 407 / 500 - 406 / 500."""
    theirs = {seed: count / 500 for seed, count in enumerate(right)}
    ours = {seed: (count + more) / 500 for seed, (count, more) in enumerate(zip(right, change, strict=True))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert paired(ours, theirs).wilcoxon == pytest.approx(stats.wilcoxon(change).pvalue)


def test_equal_runs_differ_in_nothing_and_one_pair_is_no_test():
    same = {("a", "m", seed): 0.5 for seed in range(4)}
    found = paired(same, same)
    assert (found.mean, found.t, found.wilcoxon, found.above, found.below) == (0, 1, 1, 0, 0)
    assert paired({("a", "m", 0): 0.5}, same) is None


def test_a_choice_takes_of_each_seed_the_run_that_validation_prefers():
    one = tuned("lora", "", [0.7, 0.9], reached=[0.6, 0.5])
    four = tuned("lora_plus", "ratio 4", [0.6, 0.8], reached=[0.5, 0.7])
    choices = [{"method": "lora_plus", "label": "chosen", "of": ["lora", "lora_plus (ratio 4)"]}]
    (chosen,) = chosen_rows(choices, [one, four])
    assert chosen.values == [0.7, 0.8], "not 0.9, which the test alone prefers"
    assert (chosen.name, chosen.chosen) == ("lora_plus (chosen)", True)
    del four.records[1]
    (chosen,) = chosen_rows(choices, [one, four])
    assert list(chosen.records) == [0], "a seed without all its runs chooses nothing"


def test_a_table_with_choices_counts_its_runs_once(tmp_path):
    table, store = load("ratios"), Store(tmp_path)
    for cell in table.cells:
        if cell.task == "eurosat" and cell.model == "resnet":
            write(store, cell, 0.5 + 0.01 * cell.seed)
    lines = rows(table, store.read_all())
    chosen = {line.name for line in lines if line.chosen and line.records}
    assert chosen == {"lora_plus (ratio chosen)", "flora (ratio chosen)", "flora (gradient, ratio chosen)"}
    assert "- records: 27, " in markdown(table, lines)


@pytest.mark.parametrize(
    "choice", ["lora", {"method": "m", "label": "l"}, {"method": "m", "label": "l", "of": ["nothing"]}]
)
def test_a_choice_of_no_rows_is_refused(choice, tmp_path, monkeypatch):
    (tmp_path / "experiments").mkdir()
    scale = {"choose": [choice], "grid": {"adapter": ["lora"], "seed": [0]}}
    (tmp_path / "experiments" / "t.yaml").write_text(yaml.safe_dump({"title": "T", "scales": {"mini": scale}}))
    monkeypatch.setattr(cells, "ROOT", tmp_path)
    with pytest.raises(ConfigError, match="choose"):
        load("t")


def test_a_size_is_the_mean_over_data_sets_with_the_deviation_of_that_mean():
    counts = {"trainable_params": 50, "head_params": 100, "total_params": 1100}
    lines = [row("a", "lora", "r=1", [0.4, 0.6], **counts), row("b", "lora", "r=1", [0.8, 0.8], **counts)]
    lines.append(row("a", "lora", "r=2", [0.9, 0.9], **counts))  # of one set alone: no point
    ((point,),) = points(lines).values()
    assert (point.share, point.mean, point.std) == pytest.approx((5.0, 0.65, math.sqrt(0.005)))


def test_correlations_are_scipys_and_each_methods_best_rate_is_validations():
    slow, fast = row("t", "lora", "lr=1", [0.5, 0.6]), row("t", "lora", "lr=2", [0.7, 0.4])
    for at, record in enumerate([*slow.records.values(), *fast.records.values()]):
        record |= {"delta_norm": (3.0, 1.0, 4.0, 1.5)[at], "amplification": 2.0, "validation": (0.1, 0.1, 0.3, 0.3)[at]}
    assert best_rates([slow, fast]) == [fast]
    table = "\n".join(correlations_markdown([slow, fast]))
    found = stats.spearmanr([3.0, 1.0, 4.0, 1.5], [0.5, 0.6, 0.7, 0.4])
    assert f"| t | convnext | all methods | 4 | {found.statistic:+.2f} (p = {found.pvalue:.2g}) | - | - |" in table


def test_dashes_are_explained_where_they_stand():
    counts = {"trainable_params": 5, "head_params": 1, "total_params": 10, "skipped_layers": [], "lr": 0.1}
    said = dashes([row("t", "lora", "", [0.5, 0.6], **counts), row("t", "full", "", [])])
    assert any(line.startswith("time / LoRA, -: ") for line in said)
    assert said[-1] == "rows of dashes: of 1 no run is finished"
    assert dashes([]) == []


def test_what_was_published_for_other_models_stands_below_as_printed():
    head, body, notes = as_printed(load("table3_glue"))
    assert head[:3] == ["group", "method", "parameters"]
    flora = dict(zip(head, next(r for r in body if r[:2] == ["r8", "FLoRA"]), strict=True))
    assert flora["CoLA"] != DASH
    assert all("Table III" in note or "dash" in note for note in notes)
    assert as_printed(load("table3_glue", "paper")) == ([], [], [])


def test_a_published_number_of_another_model_has_no_difference(tmp_path):
    table, store = load("table3_glue"), Store(tmp_path)
    wanted = ("cola", "lora", "8")
    cell = next(c for c in table.cells if (c.task, c.method, c.settings.get("adapter.r")) == wanted)
    write(store, cell, 0.5)
    (shown,) = [line for line in rows(table, store.read_all()) if line.records]
    assert shown.published is not None
    assert shown.difference is None
    assert "published number is of deberta_v3_base" in shown.footnotes[0]
