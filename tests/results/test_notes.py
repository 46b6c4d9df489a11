"""What a table marks, and what it says of itself: made-up records, each rule by hand."""

import re

import pytest

from flora.results import Store
from flora.results.cells import Table, load
from flora.results.conclusions import conclusions
from flora.results.notes import notes
from flora.results.own import own_rows
from flora.results.plots import plots
from flora.results.reported import Published
from flora.results.rows import AS_PUBLISHED, Row, rows, set_marks
from flora.results.tables import as_csv, compact, latex, markdown
from tests.results.records import settings_of, write

TABLE = Table("t", "mini", {"title": "T"}, [])
CHOSEN = {"values": {"0.001": 0.7, "0.003": 0.8}, "chosen": 3e-3, "seconds": 9.0}
FIXED, ONCE = "as in the files", "validation a drawn 10% of train, seed 0"


def record(value, **changes):
    facts = {"value": value, "metric": "accuracy", "trainable_params": 50, "head_params": 5, "total_params": 1000}
    facts |= {
        "skipped_layers": [],
        "versions": {},
        "run_id": "r",
        "sha256": "0",
        "protocol": "holdout",
        "dtype": "fp32",
    }
    return facts | {"device": "gpu", "commit": "c0ffee", "split_rule": FIXED, "selection": {}} | changes


def row(method, *values, task="rte", seeds=None, changes=(), **more):
    """A line with a record of each value; ``changes``: of each record, or one for all."""
    seeds = seeds or range(len(values))
    each = changes if isinstance(changes, list) else [dict(changes)] * len(values)
    records = {seed: record(value, **new) for seed, value, new in zip(seeds, values, each, strict=True)}
    return Row(task, "minilm_l6", method, "", records, cells=3, **more)


def marks(*lines):
    return {line.name: line.mark for line in set_marks(lines)}


def test_one_seed_is_never_marked():
    assert marks(row("lora", 0.8), row("flora", 0.9)) == {"lora": "", "flora": ""}


def test_rows_of_unequal_seeds_are_never_marked():
    full = row("full", 0.7, 0.7, 0.71)
    assert set(marks(full, row("flora", 0.9, 0.9)).values()) == {""}
    assert set(marks(row("lora", 0.8, 0.8), row("flora", 0.9, 0.91, seeds=(1, 2))).values()) == {""}
    assert set(marks(full, row("lora", 0.8, 0.8, 0.8), row("flora", 0.9)).values()) == {""}, "one seed in the block"
    assert marks(full, row("flora", 0.9, 0.9, 0.92)) == {"full": "", "flora": "best"}
    assert set(marks(full, row("flora", 0.9, 0.9, 0.92), row("dora")).values()) == {""}, "which might be the best"


def test_a_row_alone_is_not_the_best_of_anything():
    assert marks(row("flora", 0.9, 0.9, 0.92)) == {"flora": ""}


def both_protocols():
    """LoRA collapses at the published rates: lower than all, yet the best of its own protocol is another's matter."""
    published = {"protocol": "published rates"}
    chosen = {"protocol": "rates chosen"}
    return [
        row("lora", 0.16, 0.15, 0.17, **published),
        row("flora", 0.86, 0.85, 0.86, **published),
        row("lora", 0.861, 0.862, 0.86, **chosen),
        row("flora", 0.80, 0.81, 0.80, **chosen),
    ]


def test_marks_are_set_within_one_protocol():
    shown = set_marks(both_protocols())
    assert [(r.protocol, r.method) for r in shown if r.mark == "best"] == [
        ("published rates", "flora"),
        ("rates chosen", "lora"),
    ]
    text = markdown(TABLE, shown)
    assert "| task | model | method | protocol | ours |" in text
    assert re.search(r"\| flora \| published rates \| \*\*0\.8567", text)
    assert re.search(r"\| lora \| rates chosen \| \*\*0\.8610", text)
    assert text.count("**") == 4
    assert latex(TABLE, shown).count(r"\midrule") == 2
    assert ",published rates,accuracy," in as_csv(shown)
    assert "protocol" not in markdown(TABLE, [row("lora", 0.5)]).split("---")[0]


def test_lines_and_figures_of_two_protocols_are_kept_apart():
    shown = set_marks(both_protocols())
    text = compact(TABLE, shown, "tables")
    assert "| minilm_l6 | lora, published rates | 50 | 0.1600" in text
    assert "| minilm_l6 | lora, rates chosen | 50 | **0.8610" in text
    names = [plot.name for plot in plots(TABLE, shown, lambda _: {})]
    assert names == [f"pareto_rte_minilm_l6_{protocol}.svg" for protocol in ("published_rates", "rates_chosen")]


def test_nothing_is_concluded_from_what_is_not_compared():
    one, other = row("lora", 0.8), row("flora", 0.9)
    said = conclusions(TABLE, set_marks([one, other]))
    assert said.summary == ""
    assert said.sentences == ["rte, minilm_l6 (accuracy, n = 1): not compared (one seed): lora 0.8000, flora 0.9000."]
    said = conclusions(
        TABLE, set_marks([*both_protocols(), row("lora", 0.8, task="stsb"), row("full", 0.9, task="stsb")])
    )
    assert said.summary.startswith("Of 2 data sets and models (n = 3), first: flora 1, lora 1")
    assert "rte, minilm_l6, rates chosen (accuracy, n = 3): first is lora 0.8610" in said.sentences[1]
    assert "stsb, minilm_l6 (accuracy, n = 1): not compared (one seed)" in said.sentences[2]


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ([FIXED] * 3, "± of rte: the seed of training alone, as the splits are fixed (as in the files)"),
        ([ONCE] * 3, f"± of rte: the seed of training alone, as the data is drawn once ({ONCE})"),
        ([f"drawn, seed {n}" for n in range(3)], "± of rte: the seed of training and the draw of the data"),
        ([None] * 3, "± of rte: the seed of training; the records do not say how the data was drawn"),
    ],
)
def test_the_footer_says_what_a_deviation_is_over(rules, said):
    lines = notes(TABLE, [row("lora", 0.8, 0.8, 0.9, changes=[{"split_rule": rule} for rule in rules])])
    assert [line for line in lines if line.startswith("± of")] == [said]
    assert not [line for line in notes(TABLE, [row("lora", 0.8)]) if line.startswith("± of")], "no deviation"


def test_data_sets_of_one_rule_are_named_together():
    lines = notes(TABLE, [row("lora", 0.8, 0.8), row("lora", 0.8, 0.8, task="cola"), row("dora", 0.8, 0.8)])
    assert [line for line in lines if line.startswith("± of")] == [
        "± of rte, cola: the seed of training alone, as the splits are fixed (as in the files)"
    ]


def test_the_footer_says_of_how_many_commits_and_devices_the_records_are_and_which_steps_were_captured():
    runs = [
        {"commit": "b", "device": "H100", "execution": {"cuda_graph": True}},
        {"commit": "a", "device": "H100", "execution": {"cuda_graph": True}},
        {"commit": "a", "device": "cpu", "execution": {"cuda_graph": False}},
        {"commit": "a", "device": "cpu", "execution": {}},
    ]
    lines = notes(TABLE, [row("lora", 0.8, 0.8, 0.8, 0.9, changes=runs)])
    assert "commit: 2 of them, a; b" in lines
    steps = "2 runs captured as CUDA graphs, 1 runs eager, 1 runs not recorded whether captured"
    assert f"device: 2 of them, H100; cpu; steps: {steps}" in lines
    lines = notes(TABLE, [row("lora", 0.8, changes=runs[0])])
    assert "commit: b" in lines
    assert "device: H100; steps: captured as CUDA graphs" in lines


def published(value=0.9):
    return Published(value, "1M", "arXiv 2405.14739", "primary", "")


def footnotes(line):
    return [note for note in notes(TABLE, [line]) if note.startswith("¹")]


def test_a_row_beside_a_published_number_says_how_it_was_run_unless_its_file_says_that_it_is_as_published():
    line = row("lora", 0.8, published=published())
    assert footnotes(line) == [
        "¹ not known to follow the protocol of the published number beside it: minilm_l6, protocol holdout, learning"
        " rate not chosen"
    ]
    assert "| minilm_l6 | lora¹ | 0.9000 | 0.8000 (n = 1 of 3) |" in markdown(TABLE, [line])
    assert r"minilm\_l6 & lora$^{1}$ & 0.9000" in latex(TABLE, [line])
    assert "not known to follow the protocol" in as_csv([line])
    tuned = row("lora", 0.8, published=published(), changes={"selection": CHOSEN})
    assert footnotes(tuned)[0].endswith("learning rate chosen on validation")
    assert footnotes(row("lora", 0.8, published=published(), note="two epochs, not 24")) == ["¹ two epochs, not 24"]
    assert footnotes(row("lora", 0.8, published=published(), protocol=AS_PUBLISHED)) == []
    assert footnotes(row("lora", published=published())) == [], "nothing of ours stands there"
    assert footnotes(row("lora", 0.8, published=published(None))) == [], "nothing was printed"


def test_a_grid_whose_rates_all_score_the_same_chose_nothing():
    vain = {"selection": {"values": {"0.001": 0.7, "0.003": 0.7}, "chosen": 1e-3, "seconds": 9.0}}
    line = row("linear_probe", 0.8, 0.8, changes=[vain, {"selection": CHOSEN}])
    assert not line.tuned
    assert footnotes(line) == ["¹ in 1 of 2 runs, all rates of the grid score the same on validation"]
    assert row("lora", 0.8, changes={"selection": CHOSEN}).tuned
    assert not row("lora", 0.8).tuned


def test_a_choice_at_an_edge_and_a_rate_that_fell_are_counted():
    top, bottom = CHOSEN | {"edge": "top"}, CHOSEN | {"edge": "bottom"}
    fallen = CHOSEN | {"edge": None, "fallen": [{"lr": 1e-2, "why": "its training loss ended at 2.3"}]}
    line = row("lora", 0.8, 0.8, 0.8, changes=[{"selection": choice} for choice in (top, bottom, fallen)])
    said = [
        "the chosen rate is the largest that was tried",
        "the chosen rate is the smallest that was tried",
        "the rate that validation chose diverged or collapsed in the last fit, and a smaller one was taken",
    ]
    assert line.footnotes == [f"in 1 of 3 runs, {what}" for what in said]


def test_footnotes_are_numbered_by_their_text():
    shown = [row("lora", 0.8, note="a"), row("dora", 0.8), row("flora", 0.8, note="b"), row("full", 0.8, note="a")]
    text = markdown(Table("t", "mini", {"title": "T", "notes": ["Stand-ins * all."]}, []), shown)
    for words in ("| lora¹ |", "| dora |", "| flora² |", "| full¹ |", "\n- ¹ a\n- ² b\n", "\n- Stand-ins \\* all.\n"):
        assert words in text


def test_notes_of_a_file_reach_the_rendered_table(tmp_path, monkeypatch):
    table, store = load("demo"), Store(tmp_path)
    scale = table.definition["scales"]["mini"] | {"title": "Stand-ins", "notes": ["one"], "note": "two"}
    definition = table.definition | {"scales": {"mini": scale}}
    monkeypatch.setattr("flora.results.cells.read_definition", lambda name: definition)
    changed = load("demo")
    write(store, changed.cells[0], 0.5)
    text = markdown(changed, rows(changed, store.read_all()))
    assert text.startswith("# Stand-ins\n")
    assert "\n- one\n- ¹ two\n" in text
    assert "| linear_probe¹ |" in text


def test_a_record_says_by_which_rule_its_data_was_split(tmp_path):
    table, store = load("demo"), Store(tmp_path)
    for seed, cell in enumerate(table.cells[:2]):
        write(store, cell, 0.5, data={"source": "re-rendered", "split_rule": f"drawn, seed {seed}"})
    rules = [summary["split_rule"] for summary in store.read_all().records.values()]
    assert sorted(rules) == ["drawn, seed 0", "drawn, seed 1"]


def test_own_runs_whose_draw_follows_the_seed_are_one_line():
    (cell, *_) = load("demo").cells
    base = settings_of(cell)

    def lines(draws):
        runs = {}
        for seed, draw in draws:
            config = base | {"seed": seed, "task": base["task"] | {"split_seed": draw}}
            facts = {"run_id": f"{seed} {draw}", "dataset": "d", "model": "m", "adapter": "lora", "seed": seed}
            runs[f"{seed} {draw}"] = record(0.5, started=f"{seed}", config=config, **facts)
        return [list(row.records) for row in own_rows(runs.values(), runs.get)]

    assert lines([(0, 0), (1, 1), (2, 2)]) == [[0, 1, 2]]
    assert lines([(0, 0), (1, 0), (2, 0)]) == [[0, 1, 2]]
    assert lines([(0, 0), (1, 0), (1, 1)]) == [[0, 1], [1]]
