"""Tables and figures: only what was measured, the same bytes each time, and stale when a record changes."""

import csv
import dataclasses
import io
import json
import os
import re
import shutil
from functools import partial

import pytest
import yaml

from flora.files import ROOT
from flora.launch.entry import main
from flora.results import Store, cells
from flora.results.cells import load
from flora.results.looks import STYLES
from flora.results.plots import front, written_hash
from flora.results.reported import published
from flora.results.rows import Row, rows
from flora.results.tables import as_csv, cells_as_text, compact, group_means, latex, markdown
from scripts.make_tables import make_tables
from tests.results.records import write

VALUES = {"flora": (0.90, 0.91, 0.92), "lora": (0.90, 0.90, 0.945), "full": (0.80, 0.81, 0.83)}


@pytest.fixture
def store(tmp_path):
    """Records of eurosat's convnext cells, the linear probe missing."""
    store = Store(tmp_path / "records")
    for cell in load("eurosat").cells:
        if cell.model == "convnext" and cell.method in VALUES:
            cost = 3.0 if cell.method == "flora" else 2.0
            write(store, cell, VALUES[cell.method][cell.seed], train_seconds=cost)
    return store


@pytest.fixture
def render(tmp_path, script):
    """Run make_tables.py in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        places = ["--results", str(tmp_path / "records"), "--output", str(tmp_path / "out")]
        return script(partial(main, make_tables, trace=lambda: False), "make_tables.py", *arguments, *places)

    return call


def line(text, *words):
    (text,) = (line for line in text.splitlines() if all(f"| {word} " in line for word in words))
    return [cell.strip() for cell in text.strip("|").split("|")]


def test_a_line_shows_mean_deviation_count_costs_and_mark(store):
    text = markdown(load("eurosat"), rows(load("eurosat"), store.read_all()))
    assert line(text, "convnext", "lora")[3] == "0.9150 ± 0.0260 (n = 3)", "the linear probe is missing"
    for cell in load("eurosat").cells:
        if (cell.model, cell.method) == ("convnext", "linear_probe"):
            write(store, cell, 0.5)
    text = markdown(load("eurosat"), rows(load("eurosat"), store.read_all()))
    # 0.90, 0.91, 0.92: mean 0.91, deviation 0.01; 50 of 1000 parameters; 3 s against LoRA's 2 s
    flora = line(text, "convnext", "flora")
    assert flora[3:] == ["0.9100 ± 0.0100 (n = 3)*", "accuracy", "50", "5.00", "1.50", "1.00", "0.001", "0"]
    # 0.90, 0.90, 0.945: mean 0.915; squares 2 x 0.000225 + 0.0009 = 0.00135, / 2, root 0.02598
    assert line(text, "convnext", "lora")[3] == "**0.9150 ± 0.0260 (n = 3)**"
    assert line(text, "convnext", "full")[3] == "0.8133 ± 0.0153 (n = 3)"


def test_what_was_not_measured_is_a_dash_and_a_missing_seed_is_said(store):
    cell = next(c for c in load("eurosat").cells if (c.method, c.model, c.seed) == ("flora", "convnext", 2))
    store.path(cell.cell_id).unlink()
    text = markdown(load("eurosat"), rows(load("eurosat"), store.read_all()))
    assert set(line(text, "convnext", "linear_probe")[3:]) == {"-"}
    assert "0.9050 ± 0.0071 (n = 2 of 3)" in line(text, "convnext", "flora")[3]


def test_costs_are_related_to_lora_only_where_both_ran_in_the_same_way(store):
    for cell in load("eurosat").cells:
        if cell.model == "convnext" and cell.method == "flora":
            write(store, cell, 0.9, train_seconds=1.0, execution={"cuda_graph": cell.seed < 2})
    (flora,) = [row for row in rows(load("eurosat"), store.read_all()) if row.records and row.method == "flora"]
    assert (
        flora.relative("train_seconds") == 0.5
    )  # of the one seed that was not captured, as LoRA's was not: 1 s to 2 s


def test_costs_are_related_to_lora_of_the_same_rank_whatever_else_a_method_sets(store):
    table = load("rank_sweep")
    some = [c for c in table.cells if c.task == "eurosat" and c.settings["adapter.r"] in ("4", "8")]
    for cell in some:
        seconds = float(cell.settings["adapter.r"]) if cell.method == "lora" else 2.0
        write(store, cell, 0.9, train_seconds=seconds)
    flora = [row for row in rows(table, store.read_all()) if row.method == "flora" and row.records]
    found = {row.settings: row.relative("train_seconds") for row in flora}
    assert found == {"r=4": 2 / 4, "r=8": 2 / 8}


def test_the_footer_says_where_the_numbers_come_from(store):
    text = markdown(load("eurosat"), rows(load("eurosat"), store.read_all()))
    for words in (
        "commit: c0ffee",
        "protocol: vtab1k; dtype: fp32",
        "device: cpu; steps: ",
        "versions: ",
        "Holm",
        "sha256 ",
    ):
        assert words in text


def test_the_csv_holds_unrounded_numbers(store):
    lines = list(csv.DictReader(io.StringIO(as_csv(rows(load("eurosat"), store.read_all())))))
    flora = next(row for row in lines if (row["model"], row["method"]) == ("convnext", "flora"))
    assert float(flora["mean"]) == pytest.approx(0.91)
    assert float(flora["std"]) == pytest.approx(0.01)
    assert float(flora["time_to_lora"]) == pytest.approx(1.5)
    assert next(row for row in lines if row["method"] == "linear_probe")["mean"] == ""


def test_the_table_at_a_glance_has_a_column_per_data_set(store):
    table = load("eurosat")
    text = compact(table, rows(table, store.read_all()), "tables")
    lines = [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines() if row.startswith("|")]
    assert lines[0] == ["model", "method", "adapter params", "eurosat"]
    assert ["convnext", "flora", "50", "0.9100 ± 0.0100"] in lines
    assert ["convnext", "linear_probe", "-", "-"] in lines
    assert len(lines) == 2 + 8
    other = Row("dtd10", "convnext", "dora", "", {}, cells=3)  # a method that has one of the two sets
    assert "| convnext | dora | - | - | - |" in compact(table, [*rows(table, store.read_all()), other], "tables")
    assert "9 of 24 runs are finished" in text
    write(store, table.cells[0], 0.5, data={"source": "re-rendered"})
    assert "| eurosat (re-rendered) |" in compact(table, rows(table, store.read_all()), "tables")


def test_the_readme_shows_a_table_between_its_markers_and_nothing_else_changes(store, render, tmp_path, monkeypatch):
    monkeypatch.setattr("flora.results.render.names", lambda: ["eurosat"])
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- table eurosat, rendered by scripts/make_tables.py -->\n?<!-- end of table -->\nb\n")
    answers = tmp_path / "out" / "README.md"
    answers.parent.mkdir(exist_ok=True)
    answers.write_text(readme.read_text())
    assert render("--check")[0] == 1
    assert render()[0] == 0
    table = load("eurosat")
    shown = compact(table, rows(table, store.read_all()), "out/tables")
    begin, end = readme.read_text().split(shown)
    assert begin == "a\n<!-- table eurosat, rendered by scripts/make_tables.py -->\n"
    assert end == "<!-- end of table -->\nb\n"
    assert render("--check")[0] == 0
    assert "| convnext | flora | 50 |" in readme.read_text()
    for page in (readme, answers):
        (link,) = re.findall(r"\[all columns\]\((.*)\)", page.read_text())
        assert (page.parent / link).is_file()


def test_latex_is_a_booktabs_table_with_nothing_left_to_escape(store):
    table = load("eurosat")
    named = dataclasses.replace(table, definition=table.definition | {"title": "100 % of a_b"})
    text = latex(named, rows(table, store.read_all()))
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 1
    assert r"\caption{100 \% of a\_b}" in text
    body = [row for row in text.splitlines() if row.endswith(r"\\")]
    assert len(body) == 1 + 8
    assert {row.count(" & ") for row in body} == {10}
    assert not re.search(r"(?<!\\)[%_#]", " ".join(body))


def test_published_numbers_stand_beside_ours_with_their_difference(tmp_path, monkeypatch):
    for name in ("configs", "results/reported"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "experiments").mkdir()
    monkeypatch.setattr(cells, "ROOT", tmp_path)
    part = {"published": "r2", "grid": {"task.dataset": ["rte"], "adapter": ["flora", "lora"], "seed": [0]}}
    where = {"file": "table3_glue_debertav3_base", "columns": {"rte": "RTE"}, "scale": 100}
    (tmp_path / "experiments" / "t.yaml").write_text(
        yaml.safe_dump({"title": "T", "published": where, "scales": {"mini": {"parts": [part]}}})
    )
    table, store = load("t"), Store(tmp_path / "records")
    write(store, table.cells[0], 0.9)
    flora, lora = (cells_as_text(row) for row in rows(table, store.read_all()))
    assert flora[4:7] == ["0.8881", "0.9000 (n = 1)", "+0.0119"]
    assert lora[4:7] == ["0.8556", "-", "-"]
    text = markdown(table, rows(table, store.read_all()))
    assert "published: arXiv 2407.05417v2, Table III (secondary)" in text
    assert "rte flora: the LoRA-Dash project page prints 88.09" in text


def test_every_published_file_and_column_that_a_table_names_exists():
    for name in cells.names():
        for scale in cells.scales(name):
            published(load(name, scale))
    glue = published(load("table3_glue", "paper"))
    shown = rows(load("table3_glue", "paper"), Store("/nowhere").read_all())
    assert len([row for row in shown if row.published]) == 8 * (13 + 3 * 8 + 4)  # FLoRA twice
    assert glue["r8", "FLoRA", "rte"].value == 0.8953


def test_rendering_twice_gives_the_same_bytes_and_a_touched_record_is_stale(store, render, tmp_path):
    assert render("eurosat")[0] == 0
    out = tmp_path / "out"
    made = {path: path.read_bytes() for path in out.rglob("*.*")}
    assert {path.suffix for path in made} == {".md", ".tex", ".csv", ".svg", ".json"}
    assert render("eurosat", "--check")[0] == 0
    assert render("eurosat")[0] == 0
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == made

    touched = sorted(store.folder.glob("*.json"))[0]
    record = json.loads(touched.read_text())
    touched.write_text(json.dumps(record | {"error": "not even shown in the table"}))
    code, _, err = render("eurosat", "--check")
    assert code == 1
    assert {row.rpartition(".")[2] for row in err.splitlines() if row.startswith("stale")} == {"md", "tex", "svg"}
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == made, "--check writes nothing"


def test_figures_carry_the_hash_of_their_data(store, render, tmp_path):
    render("eurosat")
    (figure,) = tmp_path.rglob("*.svg")
    assert figure.name == "pareto_eurosat_convnext.svg"
    before = written_hash(figure)
    figure.unlink()
    assert render("eurosat", "--check")[0] == 1
    render("eurosat")
    assert written_hash(figure) == before
    assert re.fullmatch("[0-9a-f]{64}", before)


def test_methods_keep_their_colours_in_the_written_figure(store, render, tmp_path):
    render("eurosat")
    (figure,) = tmp_path.rglob("*.svg")
    picture = figure.read_text()
    for method in VALUES:
        assert f"stroke:{STYLES[method][0].lower()}" in picture, method


def test_broken_records_are_reported_and_never_averaged(store, render, tmp_path):
    before = render("eurosat")[1]
    content = json.loads(sorted(store.folder.glob("*.json"))[0].read_text())
    missing = next(c for c in load("eurosat").cells if c.method == "linear_probe")
    for name, text in {
        missing.cell_id: json.dumps(content | {"run_id": missing.cell_id, "value": float("nan")}),
        "0" * 12: json.dumps(content | {"run_id": "0" * 12, "schema_version": 99}),
        "1" * 12: json.dumps(content)[:80],
    }.items():
        (store.folder / f"{name}.json").write_text(text)
    code, after, err = render("eurosat")
    assert code == 0
    assert after == before
    assert err.count("left out: ") == 3


def test_an_odd_entry_among_the_records_is_named_and_the_rest_is_rendered(store, render, tmp_path):
    (tmp_path / "records" / "copied.json").symlink_to("nowhere")
    os.mkfifo(tmp_path / "records" / "pipe.json")
    code, _, err = render("eurosat")
    assert code == 0, err
    assert err.count("left out: ") == 2
    assert render("eurosat", "--check")[0] == 0


def test_without_a_table_all_that_have_records_are_rendered(store, render):
    code, out, err = render()
    assert code == 0, err
    names = [path.rpartition("/")[2] for path in out.split()]
    assert {"eurosat.md", "eurosat.tex", "eurosat.csv"} <= set(names)
    assert not any(name.startswith("figure4_norms.") for name in names)
    assert render("--check")[0] == 0


def test_a_table_without_records_leaves_files_that_a_check_names(store, render, tmp_path, monkeypatch):
    monkeypatch.setattr("flora.results.render.names", lambda: ["eurosat", "structure_ablation"])
    (first, *_), (second, *_) = list(load("structure_ablation").rows.values())[:2]  # side by side in a figure
    before = set(store.folder.glob("*.json"))
    for cell in (first, second):
        write(store, cell, 0.5)
    made = set(store.folder.glob("*.json")) - before
    assert render()[0] == 0
    assert render("--check")[0] == 0
    (tmp_path / "out" / "tables" / "delta_eurosat_convnext_0123.csv").write_text("what analyze_delta.py writes\n")
    for path in made:
        path.unlink()
    for arguments, ends in (((), 0), (("--check",), 1)):
        code, _, err = render(*arguments)
        assert code == ends
        left = [line for line in err.splitlines() if line.endswith("nothing renders it any more, remove it")]
        assert len([line for line in left if "/tables/structure_ablation." in line]) == 3
        assert all("/structure_ablation" in line for line in left)
        assert [line for line in left if ".svg" in line]
    assert err.splitlines()[-1] == f"error: {len(left)} files are stale: remove them"


def test_a_check_of_one_table_names_what_is_left_of_it_alone(store, render, tmp_path):
    render("eurosat")
    assert render("eurosat", "--check")[0] == 0
    for name in ("tables/eurosat.txt", "figures/eurosat/old.svg", "tables/vtab.md", "figures/vtab/old.svg"):
        path = tmp_path / "out" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    code, _, err = render("eurosat", "--check")
    assert code == 1
    left = [line for line in err.splitlines() if line.endswith("nothing renders it any more, remove it")]
    assert len(left) == 2
    assert all("/eurosat" in line for line in left)


def test_no_record_is_an_error(render):
    for arguments in ((), ("eurosat",)):
        code, _, err = render(*arguments)
        assert code == 2
        assert err.strip().splitlines()[-1].startswith("error: no finished record")


@pytest.mark.slow
def test_every_kind_of_figure_can_be_drawn(tmp_path, render):
    store, table = Store(tmp_path / "records"), load("eurosat")
    for cell in table.cells:
        if cell.model == "convnext":
            write(store, cell, 0.5 + 0.01 * cell.seed + 0.05 * len(cell.method))
    for cell in load("rank_sweep").cells[:30]:
        write(store, cell, 0.5)
    for cell in load("budget_curve").cells:
        if cell.model == "resnet":
            write(store, cell, 0.5 + 0.01 * cell.seed, trainable_params=50 if cell.method == "lora" else 500)
    for cell in load("vtab").cells:
        if (cell.model, cell.method) in (("convnext", "flora"), ("convnext", "lora")):
            write(store, cell, 0.5)
    for cell in load("figure4_norms").cells:
        rate = float(cell.settings["trainer.lr"])
        steps = [{"step": s, "delta_norm": rate * s, "amplification": 1 / rate} for s in (50, 100)]
        write(store, cell, 0.5 + rate, history=steps)
    kinds = set()
    for name in ("eurosat", "vtab", "budget_curve", "rank_sweep", "figure4_norms"):
        _, out, _ = render(name)
        kinds |= {
            path.rpartition("/")[2].removesuffix(".svg").split("_")[0] for path in out.split() if path.endswith(".svg")
        }
    assert kinds == {"pareto", "radar", "rank", "norms", "correlation", "budget"}


def test_the_pareto_front_by_hand():
    assert front([(10, 0.5), (5, 0.4), (20, 0.45), (10, 0.6), (1, 0.4)]) == [(1, 0.4), (10, 0.6)]


def test_methods_have_colours_of_their_own():
    colours = [colour for colour, _ in STYLES.values()]
    assert len(set(colours)) == len(colours)


def test_a_groups_mean_needs_all_runs_of_its_sets_with_rates_chosen_on_validation():
    def row(task, *values, chosen=True):
        selection = {"values": {"0.001": 0.5, "0.003": 0.4}} if chosen else {}
        records = {seed: {"value": v, "selection": selection} for seed, v in enumerate(values)}
        return Row(task, "convnext", "flora", "", records, cells=2)

    groups = {"g": ["a", "b"], "h": ["c"]}
    whole = [row("a", 0.2, 0.4), row("b", 0.5, 0.7), row("c", 0.8, 1.0)]
    label = ["convnext", "flora"]
    assert group_means(whole, groups) == [[*label, "0.4500", "0.9000", "0.6750"]]
    for less in (row("b"), row("b", 0.5), row("b", 0.5, 0.7, chosen=False)):
        assert group_means([whole[0], less, whole[2]], groups) == [[*label, "-", "0.9000", "-"]]
    assert group_means([row("a"), row("b"), row("c")], groups) == []
    assert group_means([row(task, 0.5, 0.5, chosen=False) for task in "abc"], groups) == []


def test_vtabs_group_means_and_their_mean_stand_below_the_table(tmp_path):
    table, store = load("vtab"), Store(tmp_path / "records")
    values = {"caltech101": 0.8, "eurosat": 0.7}
    values |= {"dsprites_location": 0.2, "dsprites_orientation": 0.4, "nlvr_count": 0.3}
    for cell in table.cells:
        if cell.method == "flora" or (cell.method == "lora" and cell.task != "eurosat"):
            write(store, cell, values[cell.task])
    below = markdown(table, rows(table, store.read_all())).split("mean of group means")[1].split("Means stand")[0]
    assert line(below, "convnext", "flora")[2:] == ["0.8000", "0.7000", "0.3000", "0.6000"]
    assert line(below, "convnext", "lora")[2:] == ["0.8000", "-", "0.3000", "-"]
    assert "chose its learning rate on validation" in markdown(table, rows(table, store.read_all()))
