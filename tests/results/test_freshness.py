"""results/rendered.json: a check need not render where nothing has changed, and never trusts it where something has."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from flora.config import recorded_id
from flora.files import ROOT
from flora.launch.entry import main
from flora.results import Store, freshness
from flora.results.cells import load
from scripts.make_tables import make_tables
from tests.results.records import settings_of, write

BEGIN, END = "<!-- table eurosat, rendered by scripts/make_tables.py -->\n", "<!-- end of table -->"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Records of eurosat's and of demo's first cells, and no other table."""
    monkeypatch.setattr("flora.results.render.names", lambda: ["demo", "eurosat"])
    store = Store(tmp_path / "records")
    for cell in [*load("eurosat").cells[:6], *load("demo").cells[:2]]:
        write(store, cell, 0.5)
    (tmp_path / "README.md").write_text(f"words\n{BEGIN}{END}\nwords\n")
    return store


@pytest.fixture
def render(tmp_path, script):
    """Run make_tables.py in this process; its exit code."""

    def call(*arguments):
        places = ["--results", tmp_path / "records", "--output", tmp_path / "out"]
        return script(partial(main, make_tables, trace=lambda: False), "make_tables.py", *arguments, *places)[0]

    return call


@pytest.fixture
def fresh(tmp_path):
    """Whether the files of a table, or all, are proved to be fresh."""
    return lambda table=None: freshness.fresh(table, [tmp_path / "records"], tmp_path / "out")


def test_a_check_of_what_was_rendered_renders_nothing(store, render, fresh, monkeypatch):
    assert not fresh()
    assert render() == 0
    monkeypatch.setattr("flora.results.render.rendering", None)
    assert render("--check") == 0
    assert render("eurosat", "--check") == render("demo", "--check") == 0
    assert not fresh("rank_sweep"), "a table of which nothing was rendered"


def test_a_check_without_a_manifest_renders_and_compares(store, render, fresh, tmp_path):
    render()
    (tmp_path / "out" / "rendered.json").unlink()
    assert not fresh()
    assert render("--check") == 0
    assert not fresh(), "a check writes nothing"


def edit(path):
    path.write_bytes(path.read_bytes() + b" ")


CHANGES = {
    "a record is new": lambda folder: write(Store(folder / "records"), load("eurosat").cells[7], 0.5),
    "a record is gone": lambda folder: min((folder / "records").glob("*.json")).unlink(),
    "a record is touched": lambda folder: edit(min((folder / "records").glob("*.json"))),
    "a table is edited": lambda folder: edit(folder / "out/tables/eurosat.tex"),
    "a table is gone": lambda folder: (folder / "out/tables/demo.csv").unlink(),
    "a figure is edited": lambda folder: edit(next((folder / "out/figures/demo").iterdir())),
    "a figure is gone": lambda folder: next((folder / "out/figures/demo").iterdir()).unlink(),
    "a file is left over": lambda folder: (folder / "out/tables/rank_sweep.md").touch(),
    "claims were counted": lambda folder: (folder / "out/tables/claims.csv").touch(),
    "a benchmark is new": lambda folder: edit_new(folder / "out/benchmarks/new.json"),
    "the page is edited": lambda folder: edit(folder / "out/report.html"),
    "the README has another table": lambda folder: (folder / "README.md").write_text(f"{BEGIN}{END}"),
    "a run was analyzed": lambda folder: (folder / "out/tables/delta_a.csv").touch(),
    "the answers say other": lambda folder: (folder / "out/README.md").write_text("# Answers\n\nNone.\n"),
    "the README has no table": lambda folder: (folder / "README.md").write_text("words"),
    "the README is gone": lambda folder: (folder / "README.md").unlink(),
    "the manifest is gone": lambda folder: (folder / "out/rendered.json").unlink(),
    "the manifest is broken": lambda folder: (folder / "out/rendered.json").write_text("{}"),
    "the records lie elsewhere": lambda folder: (folder / "records").rename(folder / "elsewhere"),
}


def edit_new(path):
    path.parent.mkdir()
    path.write_text("{}")


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_since_is_not_fresh(change, store, render, fresh, tmp_path):
    render()
    assert fresh()
    CHANGES[change](tmp_path)
    assert not fresh()


def test_words_of_the_readme_a_page_that_is_not_there_and_files_of_others_change_nothing(
    store, render, fresh, tmp_path
):
    render()
    readme = tmp_path / "README.md"
    readme.write_text(readme.read_text().replace("words", "other words"))
    (tmp_path / "out" / "report.html").unlink()
    (tmp_path / "out" / "tables" / "delta_eurosat_convnext_0123.png").touch()
    (tmp_path / "records" / ".locks").mkdir()
    assert fresh()
    assert render("--check") == 0


def test_a_table_rendered_alone_proves_nothing_of_the_others(store, render, fresh):
    render()
    cell = load("eurosat").cells[7]
    write(store, cell, 0.5)
    assert render("eurosat") == 0
    assert fresh("eurosat")
    assert not fresh("demo")
    store.path(cell.cell_id).unlink()  # all is as it was when everything was rendered, but eurosat's files
    assert not fresh()
    assert render("--check") == 1


def test_a_table_rendered_alone_after_all_proves_nothing_of_all_where_it_is_new(store, render, fresh):
    render()
    render("eurosat")
    assert fresh(), "it was as it is"
    render("rank_sweep")  # which has no record, so that nothing renders it when all are
    assert not fresh()
    assert render("--check") == 1


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{}", "\0", '{"everything": 1, "inputs": 2, "files": 3}'])
def test_a_manifest_that_is_none_proves_nothing(content, store, render, fresh, tmp_path):
    render()
    (tmp_path / "out" / "rendered.json").write_text(content)
    assert not fresh()
    assert render("--check") == 0


def test_a_folder_that_is_called_like_a_record_is_no_reason_to_stop(store, render, tmp_path):
    (tmp_path / "records" / "odd.json").mkdir()
    assert render("eurosat") == render("eurosat", "--check") == 0


def test_nothing_is_proved_where_a_record_is_broken_so_that_a_check_names_it_again(store, render, fresh, tmp_path):
    render()
    (store.folder / "broken.json").write_text("{")
    assert render() == 0
    assert not fresh()
    assert not (tmp_path / "out" / "rendered.json").exists()


PLACES = [
    *("flora/config.py", "flora/names.py", "flora/results/tables.py", "flora/results/statistics.py"),
    *("flora/results/page/page.css", "configs/model/convnext.yaml", "configs/train.yaml", "experiments/eurosat.yaml"),
    "results/reported/table3_glue_debertav3_base.csv",
]


@pytest.mark.parametrize("place", PLACES)
def test_code_configs_and_published_numbers_are_among_the_inputs(place, tmp_path, monkeypatch):
    ignore = shutil.ignore_patterns("__pycache__", "models", "tasks", "training", "bench", "adapters")
    for folder in ("flora", "configs", "experiments", "results/reported"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    monkeypatch.setattr(freshness, "ROOT", tmp_path)
    monkeypatch.setattr(freshness, "_RENDERER", tmp_path / "flora" / "results" / "render.py")
    before = freshness.inputs([tmp_path / "records"], tmp_path / "out")
    assert freshness.inputs([tmp_path / "records"], tmp_path / "out") == before
    edit(tmp_path / place)
    assert freshness.inputs([tmp_path / "records"], tmp_path / "out") != before


@pytest.mark.parametrize("package", ["scipy", "numpy", "jinja2"])
def test_versions_that_may_move_a_digit_are_among_the_inputs_and_matplotlibs_is_not(package, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(freshness, "version", lambda name: asked.append(name) or "1")
    before = freshness.inputs([tmp_path], tmp_path)
    monkeypatch.setattr(freshness, "version", lambda name: "2" if name == package else "1")
    assert freshness.inputs([tmp_path], tmp_path) != before
    assert "matplotlib" not in asked


def test_the_sources_are_all_that_a_rendering_imports(store, tmp_path):
    code = "import sys, json; from scripts.make_tables import make_tables; make_tables(); print(json.dumps("
    code += "[m.__file__ for n, m in sys.modules.items() if n.startswith('flora')]))"
    asked = ["eurosat", "--results", tmp_path / "records", "--output", tmp_path / "out"]
    ended = subprocess.run([sys.executable, "-c", code, *asked], cwd=ROOT, capture_output=True, text=True, check=True)
    files = {path for path in json.loads(ended.stdout.splitlines()[-1]) if "/flora/launch/" not in path}
    assert len(files) > 15
    assert files <= {str(path) for path in freshness.sources(freshness._RENDERER)} | {
        str(ROOT / "flora" / name) for name in ("registration.py",)
    }


def test_records_of_ones_own_fill_cells_that_do_not_ship_and_are_rendered_apart(tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in load("eurosat").cells if cell.method == "lora"]
    write(Store("shipped"), cells[0], 0.5)
    for cell in cells[:2]:
        write(Store("own"), cell, 0.7)
    entry = partial(main, make_tables, trace=lambda: False)
    code, out, err = script(entry, "make_tables.py", "eurosat", "--results", "shipped", "--results", "own")
    assert code == 0, err
    assert "0.6000 ± 0.1414" in out, "of 0.5, which ships, and 0.7"
    assert not Path("results").exists()
    assert Path("outputs/rendered/tables/eurosat.md").is_file()
    assert script(entry, "make_tables.py", "eurosat", "--results", "shipped", "--results", "own", "--check")[0] == 0
    write(Store("own"), cells[2], 0.9)
    assert script(entry, "make_tables.py", "eurosat", "--results", "shipped", "--results", "own", "--check")[0] == 1


def test_two_records_of_one_cell_on_other_data_are_named_and_neither_is_shown(tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    first, other = [cell for cell in load("eurosat").cells if cell.method == "lora"][:2]
    ids = []
    for data in "ab":
        settings = settings_of(first) | {"inputs": {"data": data * 64}}
        ids.append(recorded_id(settings))
        write(Store("own"), first, 0.25, run_id=ids[-1], config=settings)
    write(Store("own"), other, 0.75)
    entry = partial(main, make_tables, trace=lambda: False)
    code, out, err = script(entry, "make_tables.py", "eurosat", "--results", "own")
    assert code == 0, err
    assert f"left out: runs {min(ids)} and {max(ids)} (eurosat" in err
    assert "0.75" in out
    assert "0.25" not in out
