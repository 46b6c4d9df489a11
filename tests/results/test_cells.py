"""experiments/: every table expands to cells that train.py composes, under the ids that their runs will have."""

import re

import pytest
from hydra import compose, initialize_config_dir

from flora import config
from flora.config import composed
from flora.errors import ConfigError
from flora.files import ROOT
from flora.results import cells
from flora.results.cells import Cell, load, names, scales
from flora.results.store import SHIPPED, Store

PAPER = {
    *("table1_convnext", "table2_internvit", "table3_glue", "table4_llava", "table5_cost", "figure1_radar"),
    *("figure4_norms", "rank_sweep", "kernel_rank_ablation", "structure_ablation", "vtab"),
    *("classification", "commonsense"),
}

FROM = "title: T, scales: {mini: {parts: [{starts_from: {model.projector"
LORA = "{grid: {adapter: [lora], seed: [0, 1]}}"


def table_of(folder, monkeypatch, text):
    """Make ``text`` the file of table t, and ``folder`` the root that holds experiments/."""
    (folder / "experiments").mkdir()
    (folder / "experiments" / "t.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr(cells, "ROOT", folder)


def test_every_table_and_figure_of_the_paper_has_its_cells():
    assert set(names()) >= PAPER
    assert {name for name in PAPER if "paper" in scales(name)} >= PAPER


@pytest.mark.parametrize(("name", "scale"), [(n, s) for n in names() for s in scales(n)])
def test_every_cell_composes_once_or_says_why_it_cannot(name, scale):
    cells = load(name, scale).cells
    assert len({cell.overrides for cell in cells}) == len(cells)
    runnable = [cell for cell in cells if not cell.not_runnable_yet]
    a_few = {
        (c.method, tuple(sorted(c.settings))): c for c in runnable
    }.values()  # one of each kind: seconds, not minutes
    assert len({cell.cell_id for cell in a_few}) == len(a_few)
    assert all(len(cell.not_runnable_yet) > 10 for cell in cells if cell.not_runnable_yet)


def test_glue_has_runs_at_published_rates_and_at_rates_chosen_on_validation():
    five = {"cola", "mrpc", "rte", "stsb", "sst2"}
    table = load("table3_glue")
    for method in ("lora", "flora", "dora", "adalora", "bitfit", "full"):
        mine = [cell for cell in table.cells if cell.method == method]
        chosen = [cell for cell in mine if "protocol.lr_grid" in cell.settings]
        assert {cell.task for cell in chosen} == five
        assert {cell.seed for cell in chosen} == {0, 1, 2}
        assert {cell.task for cell in mine if cell not in chosen} == five


def test_the_main_table_has_five_seeds_of_every_method_at_matched_budgets_and_three_rates_each_that_go_on():
    table = load("vtab")
    budgets = {cell.method: cell.settings.get("adapter.budget") for cell in table.cells}
    matched = ("flora", "flora_gradient", "dora", "lora_flat", "locon_tucker")
    free = ("lora", "full", "linear_probe", "bitfit")
    assert budgets == dict.fromkeys(matched, "match:lora:8") | dict.fromkeys(free)
    assert len(table.rows) == 5 * (3 * len(budgets) - 1), "lora_flat is not as small on EfficientNet-Lite0"
    assert all(sorted(cell.seed for cell in row) == [0, 1, 2, 3, 4] for row in table.rows.values())
    assert not {"cifar10", "dtd10", "rsscn7"} & {cell.task for cell in table.cells}, "development sets"
    protocols = [composed(row[0].overrides).protocol for row in table.rows.values()]
    assert {(len(protocol.lr_grid), protocol.extend) for protocol in protocols} == {(3, True)}


def test_tables_share_cells_that_are_the_same():
    tables, methods = ("vtab", "budget_curve", "ratios", "rank_sweep"), ("flora", "flora_gradient", "lora")
    ids = {name: {cell.cell_id for cell in load(name).cells} for name in tables}
    at_eight = [cell for cell in load("vtab").cells if cell.method in methods and cell.seed < 3]
    for cell in at_eight:
        if cell.model != "efficientnet_lite0":
            assert cell.cell_id in ids["ratios"]
            if cell.task in {c.task for c in load("budget_curve").cells}:
                assert cell.cell_id in ids["budget_curve"]
    assert ids["rank_sweep"] & ids["budget_curve"]
    assert {cell.cell_id for cell in load("eurosat").cells if cell.method != "flora"} <= ids["vtab"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["task=vtab", "task.dataset=eurosat", "protocol.lr_grid=[3e-4,1e-3]", "adapter=flora", "seed=2", "logger=none"],
        ["task=digits", "model=timm", "model.timm_name=resnet10t", "adapter=lora", "adapter.r=4", "trainer.lr=1e-3"],
        ["adapter=flora", "adapter.rank_pattern=[{pattern:stem,rank:4}]", "adapter.scale=null", "adapter.alpha=16"],
        ["task=vtab", "protocol=holdout", "adapter.target_modules=[fc1,fc2]", "analysis.every_n_steps=50"],
    ],
)
def test_composing_in_two_steps_gives_what_train_py_composes(overrides):
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        expected = compose("train", overrides=overrides)
    assert composed(overrides) == expected
    assert Cell(tuple(overrides)).cell_id == config.cell_id(expected)


def test_an_override_that_fits_no_config_is_named():
    with pytest.raises(ConfigError, match=r"adapter\.rnk"):
        composed(["adapter=lora", "adapter.rnk=3"])


def test_the_measured_runs_of_small_budgets_keep_their_ids():
    contents, ids = Store(SHIPPED).read_all(), {cell.cell_id for cell in load("small_budgets").cells}
    assert len(ids) == 275
    assert all(contents.state(cell) == "finished" for cell in ids)


def test_stage_2_of_llava_mini_starts_from_the_projector_of_stage_1():
    cells = load("instruct").cells
    first = {cell.settings["task.dataset"]: cell for cell in cells if "model.projector" not in cell.settings}
    assert {cell.method for cell in first.values()} == {"linear_probe"}
    others = [cell for cell in cells if cell not in first.values()]
    assert len(others) == 2 * 4 * 5
    for cell in others:
        assert cell.settings["model.projector"] == f"outputs/{first[cell.settings['task.dataset']].cell_id}"


def test_no_table_names_a_run_by_its_id():
    for path in (ROOT / "experiments").glob("*.yaml"):
        assert not re.search(r"\b(?=\w*\d)[0-9a-f]{12}\b", path.read_text()), path.name


def test_a_part_that_starts_from_a_cell_sets_its_output_folder(tmp_path, monkeypatch):
    table_of(
        tmp_path,
        monkeypatch,
        "{title: T, scales: {mini: {common: [task=digits], parts: ["
        "{starts_from: {model.projector: {adapter: lora, adapter.r: 4}}, common: [seed=1], grid: {adapter: [full]}},"
        "{grid: {adapter: [lora], adapter.r: [2, 4]}}]}}}",
    )
    second, _, first = load("t").cells
    assert second.starts_from == (("model.projector", first),)
    assert second.overrides == ("task=digits", f"model.projector=outputs/{first.cell_id}", "seed=1", "adapter=full")


DRAWN = [path.stem for path in (ROOT / "configs" / "task").glob("*.yaml") if "\nsplit_seed:" in path.read_text()]


@pytest.mark.parametrize("task", sorted(DRAWN))
def test_every_task_that_draws_its_data_can_draw_it_by_the_seed(task):
    assert composed([f"task={task}", "seed=3"]).task.split_seed == 0, "one draw for all seeds, unless asked"
    assert composed([f"task={task}", "task.split_seed=${seed}", "seed=3"]).task.split_seed == 3


def test_digits_are_drawn_anew_for_each_seed():
    rules = set()
    for seed in (0, 1, 1):
        cfg = composed(["task=digits", "task.split_seed=${seed}", f"seed={seed}"])
        rules.add(config.instantiate(cfg.task).load(image_size=8, data_dir=None).facts["split_rule"])
    assert len(rules) == 2
    assert all("seed" in rule for rule in rules)


def test_a_new_version_of_the_method_changes_ids_and_knows_the_old_ones(monkeypatch):
    overrides = ("task=digits", "adapter=lora")
    before = Cell(overrides).cell_id
    monkeypatch.setattr(config, "METHOD_VERSION", config.METHOD_VERSION + 1)
    after = Cell(overrides)
    assert after.cell_id != before
    assert after.older[-1] == before


def test_rows_gather_seeds_and_name_what_else_varies(tmp_path, monkeypatch):
    table_of(
        tmp_path,
        monkeypatch,
        "title: T\nscales: {mini: {common: [task=digits], parts: ["
        "{grid: {adapter: [full], seed: [0, 1]}}, {grid: {adapter: [lora], adapter.r: [2, 4], seed: [0, 1]}},"
        "{not_runnable_yet: no such model, grid: {model: [big], adapter: [lora], seed: [0]}}]}}",
    )
    table = load("t")
    assert {key: [cell.seed for cell in cells] for key, cells in table.rows.items()} == {
        ("digits", "convnext", "full", "", ""): [0, 1],
        ("digits", "convnext", "lora", "r=2", ""): [0, 1],
        ("digits", "convnext", "lora", "r=4", ""): [0, 1],
        ("digits", "big", "lora", "", ""): [0],
    }
    assert [cell.not_runnable_yet for cell in table.cells] == [None] * 6 + ["no such model"]
    with pytest.raises(ConfigError, match="no scale 'paper': choose one of mini"):
        load("t", "paper")


def test_a_scale_has_a_title_and_notes_of_its_own_and_parts_have_protocols_and_notes(tmp_path, monkeypatch):
    table_of(
        tmp_path,
        monkeypatch,
        "title: T\nnotes: [of both]\n"
        "scales: {mini: {title: Stand-ins, notes: [of mini], common: [task=digits], parts: ["
        "{protocol_name: published rates, note: N, grid: {adapter: [lora, dora]}},"
        "{protocol_name: rates chosen, common: ['protocol.lr_grid=[1e-3]'], grid: {adapter: [lora]}}]},"
        "paper: {grid: {task: [digits]}}}",
    )
    mini, paper = load("t"), load("t", "paper")
    assert (mini.title, mini.notes) == ("Stand-ins", ["of both", "of mini"])
    assert (paper.title, paper.notes) == ("T", ["of both"])
    assert [(c.method, c.protocol, c.note) for c in mini.cells] == [
        ("lora", "published rates", "N"),
        ("dora", "published rates", "N"),
        ("lora", "rates chosen", None),
    ]
    assert [(c.protocol, c.note) for c in paper.cells] == [("", None)]
    assert [key[-1] for key in mini.rows] == ["published rates", "published rates", "rates chosen"]


def test_figure_4_trains_everything_at_the_rate_of_full_fine_tuning():
    for scale, chosen in (("mini", {1e-4, 3e-4, 1e-3, 3e-3}), ("paper", {2e-5})):
        rates: dict[str, set[float]] = {}
        for cell in load("figure4_norms", scale).cells:
            if cell.task != "cola" or scale == "paper":
                rates.setdefault(cell.method, set()).add(composed(cell.overrides).trainer.lr)
        assert rates.keys() - {"flora_published_nlu"} == {"flora", "lora", "dora", "full"}
        assert rates["full"] == chosen
        assert all(max(tried) > 4 * max(chosen) or name == "full" for name, tried in rates.items())
    table3 = [cell for cell in load("table3_glue", "paper").cells if (cell.method, cell.task) == ("full", "cola")]
    assert {composed(cell.overrides).trainer.lr for cell in table3} == {2e-5}


def test_the_draw_of_the_data_follows_the_seed_where_a_table_says_so(tmp_path, monkeypatch):
    table_of(
        tmp_path,
        monkeypatch,
        "title: T\nscales: {mini: {common: [task=digits, 'task.split_seed=${seed}'], grid: {seed: [0, 1, 2]}}}",
    )
    table = load("t")
    assert len(table.rows) == 1
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        typed = {cell: compose("train", overrides=list(cell.overrides)) for cell in table.cells}
    for cell, cfg in typed.items():
        assert cfg.task.split_seed == cfg.seed == cell.seed
        assert cell.cell_id == config.cell_id(cfg)
    assert table.cells[0].cell_id == Cell(("task=digits", "seed=0")).cell_id, "seed 0 draws as it did"
    assert table.cells[1].cell_id != Cell(("task=digits", "seed=1")).cell_id


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: [", "is not YAML"),
        (b"title: \xff", "is not YAML"),
        ("{title: T, at: 2020-99-99}", "is not YAML"),
        ("[title]", "needs a title"),
        ("{title: [T]}", "needs a title"),
        ("{title: T, scales: [mini]}", "scales must be named"),
        ("{title: T, scales: {mini: [1]}}", "a scale must be settings or a list of parts"),
        ("{title: T, scales: {mini: {parts: 7}}}", "a scale must be settings or a list of parts"),
        ("{title: T, scales: {mini: {parts: [7]}}}", "a scale must be settings or a list of parts"),
        ("{title: T, scales: {mini: {common: seed=1, grid: {seed: [0]}}}}", "common must be a list of KEY=VALUE"),
        ("{title: T, scales: {mini: {common: [7], grid: {seed: [0]}}}}", "common must be a list of KEY=VALUE"),
        ("{title: T, scales: {mini: {published: [x], grid: {seed: [0]}}}}", "published must be a text"),
        ("{title: T, scales: {mini: {protocol_name: 1, grid: {seed: [0]}}}}", "protocol_name must be a text"),
        ("{title: T, scales: {mini: {parts: [{note: [x], grid: {seed: [0]}}]}}}", "note must be a text"),
        ("{title: T, notes: x, scales: {mini: {grid: {seed: [0]}}}}", "notes must be a list of texts"),
        ("{title: T, scales: {mini: {notes: [1], grid: {seed: [0]}}}}", "notes must be a list of texts"),
        ("{title: T, scales: {mini: {title: [x], grid: {seed: [0]}}}}", "title must be a text"),
        ("scales: {mini: {grid: {seed: [0]}}}", "needs a title"),
        ("{title: T, scales: {mini: {gird: {seed: [0]}}}}", "grid must give each key a list"),
        ("{title: T, scales: {mini: {grid: {adapter: lora}}}}", "grid must give each key a list"),
        ("{title: T, scales: {mini: {grid: {seed: []}}}}", "grid must give each key a list"),
        ("{title: T, scales: {mini: {grid: {seed: [0, 0]}}}}", "the same cell twice: seed=0"),
        (f"{{{FROM}: {{adapter: dora}}}}, grid: {{seed: [0]}}}}, {LORA}]}}}}}}", "name one cell, 0 have adapter=dora"),
        (f"{{{FROM}: {{adapter: lora}}}}, grid: {{seed: [0]}}}}, {LORA}]}}}}}}", "name one cell, 2 have adapter=lora"),
        (f"{{{FROM}: 0123}}, grid: {{seed: [0]}}}}, {LORA}]}}}}}}", "starts_from must give each key a cell's settings"),
    ],
)
def test_a_table_with_a_slip_is_one_line(tmp_path, monkeypatch, text, message):
    table_of(tmp_path, monkeypatch, text)
    with pytest.raises(ConfigError, match=rf"experiments/t\.yaml.*{message}"):
        load("t")
